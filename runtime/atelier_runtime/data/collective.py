"""What the ranks do together while data are prepared: exchange small objects, work in rounds, find out who shares a folder.

Everything goes through object collectives, which travel over the CPU backend: no GPU is held in a kernel while another rank
still encodes. Long work is cut into rounds that end with an exchange, so that no rank waits longer than one round (collectives
have a time limit), progress is known everywhere, and an error on one rank is raised on all.
"""

import logging
import pickle
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0

T = TypeVar("T")
R = TypeVar("R")


class Ranks(Protocol):
    """What this package needs to know of the process group."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


class Report(Protocol):
    """Told how far the preparation is: `stage` is what is done, `detail` how much of it. May raise to stop the run."""

    def __call__(self, stage: str, detail: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def gather(ranks: Ranks, value: T) -> list[T]:
    """The values of all ranks, by rank. Also a barrier."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """The result of `work`, which only rank 0 runs. An error there is raised on all ranks."""
    if ranks.world_size == 1:
        return work()
    box: list[Any] = [None]
    if ranks.rank == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[0] = _Failure(_portable(error))
            torch.distributed.broadcast_object_list(box, src=0)
            raise
    torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], _Failure):
        raise box[0].error
    result: T = box[0]
    return result


def together(ranks: Ranks, action: Callable[[], None]) -> None:
    """Runs `action` on every rank; an error on any of them is raised on all."""
    own: Exception | None = None
    try:
        action()
    except Exception as error:
        own = error
    failures = gather(ranks, None if own is None else _Failure(_portable(own)))
    if own is not None:
        raise own
    for failure in failures:
        if failure is not None:
            raise failure.error


def in_rounds(ranks: Ranks, items: Sequence[T], size: int, work: Callable[[Sequence[T]], R]) -> Iterator[list[R]]:
    """Runs `work` on this rank's `items`, `size` at a time; gives the results of all ranks that worked in each round.

    Ranks may hold different numbers of items; the iteration ends everywhere after the same round. An error on one rank is
    raised on all: there itself, elsewhere a copy, so that every process ends for the same reason.
    """
    start = 0
    while True:
        result: R | _Failure | None = None
        own: Exception | None = None
        if start < len(items):
            try:
                result = work(items[start : start + size])
            except Exception as error:
                own = error
                result = _Failure(_portable(error))
        start += size
        answers = gather(ranks, (result, start < len(items)))
        if own is not None:
            raise own
        for answer, _ in answers:
            if isinstance(answer, _Failure):
                raise answer.error
        finished = [answer for answer, _ in answers if answer is not None]
        if finished:
            yield finished  # type: ignore[misc]  # failures have been raised above
        if not any(more for _, more in answers):
            return


def _portable(error: BaseException) -> BaseException:
    """The error, or a RuntimeError of the same text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Share:
    """This rank's place among the ranks that see the same folder: work item i is its own when i % count == index."""

    index: int
    count: int


def folder_share(ranks: Ranks, folder: Path) -> Share:
    """Which ranks see the same `folder`, found out with token files. Collective.

    Ranks of one node always do; ranks of several nodes do when the folder lies on a shared file system. Where it does not,
    each node fills its own.
    """
    if ranks.world_size == 1:
        return Share(0, 1)
    nonce = on_rank_zero(ranks, lambda: uuid.uuid4().hex)
    tokens = folder / "ranks"
    tokens.mkdir(parents=True, exist_ok=True)
    own = tokens / f"{nonce}-{ranks.rank}"
    own.touch()
    gather(ranks, None)
    seen = sorted(int(path.name.rpartition("-")[2]) for path in tokens.glob(f"{nonce}-*"))
    gather(ranks, None)
    own.unlink(missing_ok=True)
    return Share(seen.index(ranks.rank), len(seen))


class Announcer:
    """Tells of progress: the caller's report on every rank, a log line on rank 0 now and then."""

    def __init__(self, ranks: Ranks, report: Report) -> None:
        self._ranks = ranks
        self._report = report
        self._logged: tuple[str, float] = ("", 0.0)

    def tell(self, stage: str, done: int, total: int) -> None:
        """Collective, so that a report that raises (a stop was asked for) ends all ranks alike."""
        together(self._ranks, lambda: self._report(stage=stage, detail=f"{done}/{total}", done=done, total=total))
        last_stage, last_time = self._logged
        if self._ranks.rank == 0 and (
            stage != last_stage or done == total or time.monotonic() - last_time > LOG_SECONDS
        ):
            self._logged = (stage, time.monotonic())
            log.info("preparing data", extra={"stage": stage, "done": done, "total": total})
