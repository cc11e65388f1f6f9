"""The trainer's end of checkpoints: a copy in memory, and a message to the writer process.

At most one save is being written; one more waits, and is replaced by a newer one. `save` takes what the memory copy takes,
nothing else happens in the trainer's process.
"""

import logging
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from atelier_api.errors import RunError
from atelier_api.progress import CheckpointReport
from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint.attempts import claim_attempt
from atelier_runtime.checkpoint.messages import (
    Idle,
    LogLine,
    Save,
    SaveOutcome,
    SnapshotFree,
    StoreRequest,
    StoreRetry,
    Superseded,
    WriterFailed,
    WriterSettings,
)
from atelier_runtime.checkpoint.ranks import Group, Ranks
from atelier_runtime.checkpoint.snapshot import SnapshotTaker
from atelier_runtime.checkpoint.writer_process import SLOTS, WriterProcess
from atelier_runtime.store import Capabilities, Store, StoreObserver, probe

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class _Start:
    """What rank 0 finds out for all."""

    attempt: str
    capabilities: Capabilities
    compare_etag: bool


class Checkpointer:
    """Saves of one run by one group of ranks. All ranks make one, and call `save` at the same steps."""

    def __init__(
        self,
        run_file: RunFile,
        ranks: Ranks,
        store: Store,
        staging: Path,
        *,
        writer: WriterProcess,
        dataset_hash: str | None = None,
        observer: StoreObserver | None = None,
    ) -> None:
        """Claim an attempt, probe the store and tell `writer`, which serves this object alone, what it writes. Collective.

        Raises CredentialsError or StoreError on all ranks where the store cannot be used. `observer` counts the writer's
        requests.
        """
        self._observer = observer
        self._outcomes: list[SaveOutcome] = []
        self._writing: Save | None = None
        self._slot_being_read: int | None = None
        self._waiting: Save | None = None
        self._closed = False
        self.latest_report: CheckpointReport | None = None
        group = Group.open(ranks)
        try:
            if ranks.local_rank == 0:
                shutil.rmtree(staging, ignore_errors=True)  # what a killed attempt left
                staging.mkdir(parents=True, exist_ok=True)
            start = group.on_rank_zero(lambda: _start(run_file, store))
            nodes = group.gather(ranks.rank - ranks.local_rank)
            self._rendezvous, address = rendezvous(group, nodes)
        finally:
            group.close()
        self.attempt = start.attempt
        staging.mkdir(parents=True, exist_ok=True)
        self._takers = [SnapshotTaker(memory) for memory in writer.memories]
        self._pipe, self._process = writer.pipe, writer.process
        self._pipe.send(
            WriterSettings(
                run_file=run_file,
                attempt=start.attempt,
                rank=ranks.rank,
                world_size=ranks.world_size,
                ranks_on_node=nodes.count(ranks.rank - ranks.local_rank),
                staging=staging,
                store_uri=store.uri,
                conditional_writes=start.capabilities.conditional_write,
                compare_etag=start.compare_etag,
                capabilities=start.capabilities.as_dict(),
                dataset_hash=dataset_hash,
                rendezvous=address,
                observed=observer is not None,
            )
        )

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state` and have it written; it may change as soon as this returns.

        `state` is nested dicts and lists of tensors, DTensors and plain values; what is not sharded must be equal on all ranks.
        A save that waits for the one being written is replaced. Raises RuntimeError when the writer process is gone.
        """
        started = time.monotonic()
        self._take_in()
        if self._waiting is not None:
            log.info("checkpoint dropped for a newer one", extra={"step": self._waiting.step, "newer": step})
            slot = self._waiting.slot
        else:
            slot = next(slot for slot in range(SLOTS) if slot != self._slot_being_read)
        self._waiting = Save(step, slot, self._takers[slot].take(state), started)
        self._start_waiting()

    def poll(self) -> list[SaveOutcome]:
        """Saves that have ended since the last call. Does not wait. Raises RuntimeError when the writer process is gone."""
        self._take_in()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def wait(self) -> None:
        """Wait until nothing is being written and nothing waits. All ranks must do so."""
        while self._writing is not None or self._waiting is not None:
            self._handle(self._receive())

    def close(self) -> None:
        """Give the save being written a little time, drop a waiting one, and end the writer process. May be called again."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + _CLOSE_SECONDS
        self._waiting = None
        try:
            while self._writing is not None and self._pipe.waiting(max(0.0, deadline - time.monotonic())):
                self._handle(self._receive())
        except RuntimeError:
            log.warning("checkpoint writer was gone before its end", exc_info=True)
        self._pipe.close()
        try:
            self._process.wait(5)
        except psutil.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for taker in self._takers:
            taker.memory.close()

    def _start_waiting(self) -> None:
        if self._writing is None and self._waiting is not None:
            self._writing, self._waiting = self._waiting, None
            self._slot_being_read = self._writing.slot
            self._tell(self._writing)

    def _take_in(self) -> None:
        """Handle what the writer has said."""
        while not self._closed and self._pipe.waiting():
            self._handle(self._receive())

    def _handle(self, message: object) -> None:
        match message:
            case SaveOutcome():
                self._outcomes.append(message)
                if message.report is not None:
                    self.latest_report = message.report
            case SnapshotFree():
                self._slot_being_read = None
            case Idle() | Superseded():
                self._writing = self._slot_being_read = None
                self._start_waiting()
            case LogLine():
                log.log(message.level, message.message, extra={**message.fields, "process": "writer"})
            case StoreRequest() if self._observer is not None:
                self._observer.storage_request(message.operation, message.code, message.seconds)
            case StoreRetry() if self._observer is not None:
                self._observer.storage_retry(message.reason)
            case WriterFailed(RunError()):
                raise message.error
            case WriterFailed():
                raise RuntimeError(f"the checkpoint writer failed: {message.error}") from message.error

    def _tell(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> object:
        try:
            return self._pipe.receive()
        except (EOFError, OSError) as error:
            raise self._gone() from error

    def _gone(self) -> RuntimeError:
        return RuntimeError(f"the checkpoint writer process is gone, exit code {self._process.wait()}")


def _start(run_file: RunFile, store: Store) -> _Start:
    capabilities = probe(store)
    compare_etag = bool(getattr(store, "compare_etag", False))
    return _Start(claim_attempt(store, run_file.attempt), capabilities, compare_etag)


def rendezvous(group: Group, nodes: Sequence[int]) -> tuple[TCPStore | None, tuple[str, int] | None]:
    """Where the writers find each other: a key-value store in rank 0's process (kept as long as it lives), and its address."""
    if group.world_size == 1:
        return None, None
    host = "127.0.0.1" if len(set(nodes)) == 1 else _address_of(os.environ["MASTER_ADDR"])
    store = None
    if group.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = group.gather(store.port if store is not None else 0)[0]
    return store, (host, port)


def _address_of(host: str) -> str:
    """The IP address of `host`, as this node sees it. A writer that starts late may not ask for it any more: names of pods are
    gone from the cluster's DNS as soon as their run is being stopped, while they still have to commit their last checkpoint."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
