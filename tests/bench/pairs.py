"""Interleaved measurements: what shares a noisy machine is compared inside the same seconds, never across runs."""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios, with the lowest and the highest."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f}, {self.pairs} pairs)"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Of measurements taken in pairs."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values), len(values))


def count_calls(work: Callable[[], object]) -> int:
    """Python and C calls that `work` makes on this thread."""
    calls = 0

    def hook(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    sys.setprofile(hook)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls
