"""What ranks tell each other while they save and resume: small objects over a gloo group that nothing else uses."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed

T = TypeVar("T")

# Uploads and downloads may take long on one rank; a rank that is gone is noticed by its closed connection, not by the clock.
PATIENCE = timedelta(hours=24)


class Ranks(Protocol):
    """What this package needs to know of the processes."""

    @property
    def rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True)
class Failure:
    """What became of a rank's part of common work."""

    rank: int
    error: Exception


@dataclass(frozen=True)
class Group:
    """The ranks of a run. `process_group` None stands for the default group."""

    rank: int
    world_size: int
    process_group: "torch.distributed.ProcessGroup | None" = None

    @classmethod
    def open(cls, ranks: Ranks) -> "Group":
        """A new gloo group over all ranks. Collective."""
        if ranks.world_size == 1:
            return cls(0, 1)
        return cls(ranks.rank, ranks.world_size, torch.distributed.new_group(backend="gloo", timeout=PATIENCE))

    def close(self) -> None:
        """Give the group's connections back."""
        if self.process_group is not None:
            torch.distributed.destroy_process_group(self.process_group)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank. Also a barrier."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.process_group)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on all ranks, by rank. An error of any rank is raised on all, the lowest rank's."""
        mine: T | Failure
        own: Exception | None = None
        try:
            mine = work()
        except Exception as error:
            own = error
            mine = Failure(self.rank, portable(error))
        results: list[Any] = self.gather(mine)
        for result in results:
            if isinstance(result, Failure):
                raise own if own is not None and result.rank == self.rank else result.error
        return results

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """The result of `work`, which only rank 0 runs. Its error is raised on all ranks."""
        result: T = self.together(work if self.rank == 0 else _nothing)[0]  # type: ignore[assignment]
        return result


def _nothing() -> None:
    """The part of the ranks that have none."""


def portable(error: Exception) -> Exception:
    """The error, or one of the same text and class name where it cannot be sent to another process."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error if isinstance(copy, Exception) else RuntimeError(str(error))
