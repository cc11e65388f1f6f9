"""What the trainer and its writer process say to each other."""

import math
import pickle
import select
import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from atelier_api.progress import CheckpointReport
from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint.snapshot import SnapshotFacts


@dataclass(frozen=True)
class WriterSettings:
    """First message to the writer. `rendezvous` is host and port of rank 0's key-value store; None with one rank."""

    run_file: RunFile
    attempt: str
    rank: int
    world_size: int
    ranks_on_node: int
    staging: Path
    store_uri: str
    conditional_writes: Literal["enforced", "ignored", "refused"]
    compare_etag: bool
    capabilities: dict[str, str]
    dataset_hash: str | None
    rendezvous: tuple[str, int] | None
    observed: bool


@dataclass(frozen=True)
class Save:
    """Write this snapshot. `started` is the monotonic clock when the trainer took it."""

    step: int
    slot: int
    snapshot: SnapshotFacts
    started: float


@dataclass(frozen=True)
class SnapshotFree:
    """The snapshot is on disk: its memory may be used again."""

    step: int


@dataclass(frozen=True)
class Superseded:
    """The other ranks have gone on to a newer save: this one is dropped, and the newer one waited for."""

    step: int


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended. `report` is None when it failed, at `stage` (save: writing to disk; upload), with `error`."""

    step: int
    report: CheckpointReport | None
    stage: str
    error: Exception | None
    save_seconds: float
    upload_seconds: float


@dataclass(frozen=True)
class Idle:
    """The save has ended, superfluous checkpoints are removed: the next save can come."""


@dataclass(frozen=True)
class WriterFailed:
    """The writer cannot go on."""

    error: Exception


@dataclass(frozen=True)
class LogLine:
    """A line for the trainer's log."""

    level: int
    message: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class StoreRequest:
    """For the trainer's metrics; see `StoreObserver`."""

    operation: str
    code: str
    seconds: float


@dataclass(frozen=True)
class StoreRetry:
    """For the trainer's metrics; see `StoreObserver`."""

    reason: str


class Pipe:
    """One end of the connection. Messages are pickled; both ends are processes of this run on this machine."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # `Connection.poll` makes a selector at each call, and the trainer asks in every step.
        self._poller = select.poll()
        self._poller.register(connection.fileno(), select.POLLIN)

    @classmethod
    def pair(cls) -> tuple["Pipe", int]:
        """This process's end, and the descriptor of the child's end."""
        ours, theirs = socket.socketpair()
        return cls(Connection(ours.detach())), theirs.detach()

    @classmethod
    def inherited(cls, descriptor: int) -> "Pipe":
        """The child's end."""
        return cls(Connection(descriptor))

    def send(self, message: object) -> None:
        """Raises OSError when the other process is gone."""
        self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def waiting(self, seconds: float = 0.0) -> bool:
        """Whether a message, or the end of the connection, is there within so many seconds. Asked by one thread at a time.

        Raises OSError when closed.
        """
        if self._connection.closed:
            raise OSError("the pipe is closed")
        return bool(self._poller.poll(math.ceil(seconds * 1000)))

    def receive(self) -> object:
        """The next message. Raises EOFError when the other process is gone."""
        try:
            return pickle.loads(self._connection.recv_bytes())
        except ConnectionResetError as error:
            raise EOFError from error

    def close(self) -> None:
        self._connection.close()
