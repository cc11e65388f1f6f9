"""The process beside each rank that writes checkpoints: everything after the snapshot, so that training never waits for it.

Forked from the trainer by `writer_process`. The writers of all ranks form a gloo group of their own. They agree on the save to
write, write it with torch.distributed.checkpoint into local staging, hash and upload each its own files; then rank 0 commits the
manifest and removes what is superfluous.

The process is niced, ignores SIGTERM and SIGINT (they are for the trainer, which ends it) and dies with its trainer.
"""

import logging
import os
import queue
import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    TCPStore,
    init_process_group,
)

from atelier_runtime.checkpoint.messages import (
    Idle,
    LogLine,
    Pipe,
    Save,
    StoreRequest,
    StoreRetry,
    Superseded,
    WriterFailed,
    WriterSettings,
)
from atelier_runtime.checkpoint.ranks import PATIENCE, Group, portable
from atelier_runtime.checkpoint.saving import Saver
from atelier_runtime.checkpoint.snapshot import SharedMemory, load_snapshot
from atelier_runtime.store import Store, open_store

log = logging.getLogger(__name__)

_NICE = 10
_PARENT_CHECK_SECONDS = 1.0


class _PipeObserver:
    """Sends the counts of store requests to the trainer, which has the metrics."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def storage_request(self, operation: str, code: str, seconds: float) -> None:
        self._pipe.send(StoreRequest(operation, code, seconds))

    def storage_retry(self, reason: str) -> None:
        self._pipe.send(StoreRetry(reason))


class _PipeLog(logging.Handler):
    """Sends log lines to the trainer, whose log they belong to."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        known = logging.makeLogRecord({}).__dict__
        fields = {key: str(value) for key, value in record.__dict__.items() if key not in known}
        try:
            self._pipe.send(LogLine(record.levelno, record.getMessage(), fields))
        except OSError:
            pass  # the trainer is gone; this process is about to end


class Writer:
    """The loop: wait for a save, agree with the other ranks, write it, tell how it ended."""

    def __init__(self, pipe: Pipe, memories: Sequence[SharedMemory], saves: "queue.Queue[Save]") -> None:
        self._pipe = pipe
        self._memories = memories
        self._saves = saves

    def run(self, settings: WriterSettings) -> None:
        """Serve until the process is ended. Raises when it cannot go on."""
        group = _join(settings)
        store = _open(settings, self._pipe)
        saver = Saver(settings, group, store)
        os.nice(_NICE)  # which on Linux lowers the disk priority as well; not before all writers have met
        saver.describe_base()
        while True:
            save = self._agree(group, self._saves.get())
            state = load_snapshot(self._memories[save.slot], save.snapshot)
            outcome = saver.save(save, state, self._pipe.send)
            self._pipe.send(outcome)
            if outcome.report is not None:
                saver.collect_garbage()
            self._pipe.send(Idle())

    def _agree(self, group: Group, save: Save) -> Save:
        """The save that all ranks write: the newest that any of them has been given.

        A rank may have been given an older one than the others: between two saves, one trainer can have replaced a pending
        save that another rank's writer has just taken. Training is in lock-step, so the newer one comes here, too.
        """
        while True:
            steps = group.gather(save.step)
            if all(step == steps[0] for step in steps):
                return save
            if save.step < max(steps):
                self._pipe.send(Superseded(save.step))
                save = self._saves.get()


def serve(pipe: Pipe, memories: Sequence[SharedMemory], trainer: int) -> None:
    """All that the process does; it does not return unless it has failed. `trainer` is the process id of its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    logging.getLogger().handlers = [_PipeLog(pipe)]
    logging.getLogger("atelier_runtime").setLevel(logging.INFO)
    messages: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(pipe, messages, trainer), daemon=True).start()
    settings = messages.get()
    assert isinstance(settings, WriterSettings)
    try:
        Writer(pipe, memories, messages).run(settings)
    except Exception as error:
        pipe.send(WriterFailed(portable(error)))


def _listen(pipe: Pipe, messages: "queue.Queue[Any]", trainer: int) -> None:
    """Take in messages. Ends the process when the trainer closes its end, or is gone while others still hold that end open."""
    while True:
        try:
            if pipe.waiting(_PARENT_CHECK_SECONDS):
                messages.put(pipe.receive())
            elif os.getppid() != trainer:
                os._exit(0)
        except (EOFError, OSError):
            os._exit(0)


def _join(settings: WriterSettings) -> Group:
    """The group of all writers."""
    if settings.rendezvous is None:
        store: Any = HashStore()
    else:
        host, port = settings.rendezvous
        store = PrefixStore("writers", TCPStore(host, port, is_master=False))
    init_process_group("gloo", store=store, rank=settings.rank, world_size=settings.world_size, timeout=PATIENCE)
    return Group(settings.rank, settings.world_size)


def _open(settings: WriterSettings, pipe: Pipe) -> Store:
    observer = _PipeObserver(pipe) if settings.observed else None
    store = open_store(settings.store_uri, settings.run_file.spec.storage.s3, observer=observer)
    if settings.store_uri.startswith("s3://"):
        from atelier_runtime.store.s3 import S3Store

        assert isinstance(store, S3Store)
        store.conditional_writes, store.compare_etag = settings.conditional_writes, settings.compare_etag
    return store
