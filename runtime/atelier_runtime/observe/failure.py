"""Why a process group ended: what each rank says, what its parent saw, and which of it is the cause.

torchrun exits with 1 whatever happened, so each rank that fails leaves a small file, and the agent finds the cause among them.
When one rank fails, its peers lose it and fail as well, often first in the log and with frightening texts: their errors never
decide while there is another. Imports no torch: errors are known by their class names and texts.
"""

import errno
import json
import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from atelier_api.errors import RunError
from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.v1alpha1.base import Block

log = logging.getLogger(__name__)

# Names of torch's exceptions, all of them subclasses of RuntimeError.
_OUT_OF_MEMORY_CLASSES = {"OutOfMemoryError", "MemoryError"}
_COLLECTIVE_CLASSES = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"}
_COLLECTIVE_CLASSES |= {
    "RendezvousError",
    "RendezvousConnectionError",
    "RendezvousTimeoutError",
    "RendezvousClosedError",
}

# Texts of plain RuntimeErrors. The order matters: NCCL wraps a GPU's fault and an allocation that failed in its own error.
_GPU_FAULT_TEXT = re.compile(
    r"\bXid\b|uncorrectable ECC|fallen off the bus|unspecified launch failure|hardware (stack )?error|nvlink|CUDA error: unknown error"
    r"|cudaErrorDevicesUnavailable|device\(s\) is/are busy or unavailable|GPU is lost",
    re.IGNORECASE,
)
_OUT_OF_MEMORY_TEXT = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate",
    re.IGNORECASE,
)
_COLLECTIVE_TEXT = re.compile(
    r"gloo/|\[gloo\]|NCCL (error|communicator)|ncclRemoteError|ncclSystemError|ncclInternalError|Connection (closed|reset) by peer"
    r"|Socket Timeout|TCPStore|Watchdog caught collective|collective operation timeout|Timed out waiting \d+ms",
    re.IGNORECASE,
)


class Failure(Block):
    """What ended one rank. `time` is Unix time; `files` are the data files at hand when it happened."""

    rank: int
    time: float
    exit_code: ExitCode
    error: str = Field(description="Class of the error, or how the process ended.")
    message: str
    traceback: str = ""
    step: int | None = None
    files: list[str] = Field(default=[], description="At most 100.")


class Ending(Block):
    """How one rank's process ended, as its parent saw it: an exit status, or minus the number of the signal that killed it."""

    rank: int
    status: int
    time: float


def record_failure(
    folder: Path,
    rank: int,
    error: BaseException,
    *,
    step: int | None = None,
    files: Sequence[str] = (),
    now: float | None = None,
) -> Failure:
    """Write why this rank fails, once: a second error of the same rank (from cleaning up) does not replace the first. Never raises."""
    failure = Failure(
        rank=rank,
        time=time.time() if now is None else now,
        exit_code=exit_code_of(error),
        error=type(error).__name__,
        message=str(error) or type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
        step=step,
        files=list(files)[:100],
    )
    path = folder / f"rank-{rank}.json"
    try:
        if not path.exists():
            _write(path, failure.model_dump_json(by_alias=True, indent=2))
    except OSError as problem:
        log.warning("a failure could not be recorded", extra={"path": str(path), "error": str(problem)})
    return failure


def read_failures(folder: Path) -> list[Failure]:
    """What the ranks have written, the earliest first. Files that cannot be read are left out."""
    failures = []
    for path in folder.glob("rank-*.json"):
        try:
            failures.append(Failure.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as problem:
            log.warning("a failure file cannot be read", extra={"path": str(path), "error": str(problem)})
    return sorted(failures, key=lambda failure: failure.time)


def write_endings(folder: Path, node_rank: int, endings: Sequence[Ending]) -> None:
    """Keep how the ranks of a node ended. torchrun's process knows, and only it."""
    _write(folder / f"endings-{node_rank}.json", json.dumps([ending.model_dump(by_alias=True) for ending in endings]))


def read_endings(folder: Path) -> list[Ending]:
    """How ranks ended, of every node that shares the folder; empty when nothing is known."""
    endings: list[Ending] = []
    for path in folder.glob("endings-*.json"):
        try:
            endings += [Ending.model_validate(ending) for ending in json.loads(path.read_bytes())]
        except (OSError, ValueError) as problem:
            log.warning("a file of endings cannot be read", extra={"path": str(path), "error": str(problem)})
    return endings


def cause(
    failures: Sequence[Failure], endings: Sequence[Ending] = (), *, stopped_at: float | None = None
) -> Failure | None:
    """The failure that decides, None when nothing failed by itself.

    The earliest that is not a lost peer; only when there is none, the earliest lost peer. Ranks that left no file are judged by
    how they ended. `stopped_at`: when the group was asked to stop; peers that lose each other after that are no failure.
    """
    known = {failure.rank for failure in failures}
    silent = [failure for ending in endings if ending.rank not in known and (failure := _of_ending(ending)) is not None]
    ordered = sorted([*failures, *silent], key=lambda failure: failure.time)
    own = [failure for failure in ordered if failure.exit_code is not ExitCode.COLLECTIVE_TIMEOUT]
    lost = [failure for failure in ordered if failure.exit_code is ExitCode.COLLECTIVE_TIMEOUT]
    if stopped_at is not None:
        lost = [failure for failure in lost if failure.time < stopped_at]
    return next(iter(own + lost), None)


def exit_code_of(error: BaseException) -> ExitCode:
    """The agent's exit code for an error: the first class or text that is known, from the error itself down its causes."""
    for link in _chain(error):
        code = _code_of(link)
        if code is not ExitCode.INTERNAL:
            return code
    return ExitCode.INTERNAL


def reason_of(error: BaseException) -> str:
    """The reason of an error from the closed set that labels and conditions use."""
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in _chain(error)):
        return "DiskFull"
    return MEANINGS[exit_code_of(error)].reason


def _code_of(error: BaseException) -> ExitCode:
    if isinstance(error, RunError):
        return error.exit_code
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _OUT_OF_MEMORY_CLASSES:
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, RuntimeError):
        text = str(error)
        if _GPU_FAULT_TEXT.search(text):
            return ExitCode.GPU_FAULT
        if _OUT_OF_MEMORY_TEXT.search(text):
            return ExitCode.OUT_OF_MEMORY
        if names & _COLLECTIVE_CLASSES or _COLLECTIVE_TEXT.search(text):
            return ExitCode.COLLECTIVE_TIMEOUT
    return ExitCode.INTERNAL


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _of_ending(ending: Ending) -> Failure | None:
    """What an ending without a failure file means; None for a rank that was done, or that torchrun stopped because of another."""
    code, error, message = ExitCode.INTERNAL, "", ""
    if ending.status in (0, -signal.SIGTERM, int(ExitCode.STOPPED)):
        return None
    if ending.status < 0:
        error = _signal_name(-ending.status)
        message = f"killed by {error}"
        if -ending.status == signal.SIGKILL:
            message += " (out of memory killer?)"
        elif -ending.status == signal.SIGABRT:
            # NCCL's watchdog ends a process this way, without an exception, when a peer is gone.
            code = ExitCode.COLLECTIVE_TIMEOUT
    else:
        error = f"exit status {ending.status}"
        message = f"left with {error} without saying why; its log tells more"
        if ending.status in MEANINGS:
            code = ExitCode(ending.status)
    return Failure(rank=ending.rank, time=ending.time, exit_code=code, error=error, message=message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
