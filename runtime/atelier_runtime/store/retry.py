"""Trying again with full jitter: pauses are drawn from [0, min(cap, base · 2^n)], so that many ranks do not come back at once."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often a whole file is tried, and how long the pauses may be."""

    attempts: int = 5
    base_seconds: float = 0.5
    cap_seconds: float = 20.0

    def run(
        self, work: Callable[[], T], *, again: Callable[[Exception], bool], on_retry: Callable[[Exception], None]
    ) -> T:
        """The result of `work`. An error for which `again` is true is retried; the last one is raised."""
        for attempt in range(self.attempts):
            try:
                return work()
            except Exception as error:
                if attempt == self.attempts - 1 or not again(error):
                    raise
                on_retry(error)
            time.sleep(random.uniform(0, min(self.cap_seconds, self.base_seconds * 2**attempt)))
        raise AssertionError("unreachable")
