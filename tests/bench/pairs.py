"""Interleaved measurements: what shares a noisy machine is compared inside the same seconds, never across runs.

Seconds come in three kinds: `wall`, `thread` (CPU of the calling thread) and `process` (CPU of all threads of this process). CPU
time leaves out what other jobs took from the machine, so it is the steadier figure on a busy one.
"""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

Columns = dict[str, list[float]]
"""Raw measurements by name, as they go into the JSON file."""


@dataclass(frozen=True)
class Row:
    """A line of the table. `target` and `standing` are empty where performance.md sets none."""

    id: str
    what: str
    measured: str
    target: str = ""
    standing: str = ""


@dataclass(frozen=True)
class Findings:
    """What one benchmark gives: lines for the table, and everything for the JSON file."""

    rows: list[Row]
    raw: dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios, with the quartiles, the lowest and the highest."""

    median: float
    first_quartile: float
    third_quartile: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.first_quartile:.3f}–{self.third_quartile:.3f}, {self.pairs} pairs)"


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Of measurements taken in pairs, two at least."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, first, third, min(values), max(values), len(values))


def difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Median of the paired differences."""
    return statistics.median(a - b for a, b in zip(left, right, strict=True))


def at_most(value: float, target: float, label: str, *, excess: bool = False) -> tuple[str, str]:
    """(target, standing) of a figure that is better when smaller. `excess`: ratios to 1 are compared by what is above 1."""
    over = (value - 1) / (target - 1) if excess else value / target
    return f"≤ {label}", "met" if value <= target else f"{over:.1f} × the target"


def at_least(value: float, target: float, label: str) -> tuple[str, str]:
    """(target, standing) of a figure that is better when larger."""
    return f"≥ {label}", "met" if value >= target else f"{value / target:.2f} of the target"


@dataclass
class Turns:
    """Seconds of the turns of one contestant."""

    wall: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    def __enter__(self) -> None:
        self._started = (time.perf_counter(), time.thread_time(), time.process_time())

    def __exit__(self, *_: object) -> None:
        ended = (time.perf_counter(), time.thread_time(), time.process_time())
        for kind, start, end in zip((self.wall, self.thread, self.process), self._started, ended, strict=True):
            kind.append(end - start)

    def columns(self) -> Columns:
        return {"wall_seconds": self.wall, "thread_seconds": self.thread, "process_seconds": self.process}


class CallCounter:
    """Counts Python and C calls of the threads it is installed in, while it is switched on."""

    def __init__(self) -> None:
        self.by_thread: dict[int, int] = {}
        self.is_on = False

    def install(self) -> None:
        """In this thread, and in those started from now on."""
        threading.setprofile(self._hook)
        sys.setprofile(self._hook)

    def remove(self) -> None:
        """From this thread, and from those started from now on."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _hook(self, _frame: FrameType, event: str, _argument: Any) -> None:
        if self.is_on and event in ("call", "c_call"):
            thread = threading.get_ident()
            self.by_thread[thread] = self.by_thread.get(thread, 0) + 1

    @property
    def here(self) -> int:
        """Calls of this thread."""
        return self.by_thread.get(threading.get_ident(), 0)

    @property
    def elsewhere(self) -> int:
        """Calls of all other threads."""
        return sum(self.by_thread.values()) - self.here


def count_calls(work: Callable[[], object]) -> int:
    """Python and C calls that `work` makes on this thread."""
    counter = CallCounter()
    counter.install()
    counter.is_on = True
    try:
        work()
    finally:
        counter.is_on = False
        counter.remove()
    return counter.here
