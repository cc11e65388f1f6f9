"""The queue of runs: one pass at a time for each, wishes become one, failures wait, a closed queue holds still."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from atelier_operator.inventory import Key
from atelier_operator.work_queue import LONGEST_BACKOFF_SECONDS, WorkQueue

A, B = ("art", "a"), ("art", "b")


class Work:
    """Notes what is worked on; each pass takes as long as `gate` is shut."""

    def __init__(self, after: float | None = None) -> None:
        self.passes: list[Key] = []
        self.busy: list[Key] = []
        self.most = 0
        self.after = after
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, key: Key) -> float | None:
        assert key not in self.busy, "two passes over one run at a time"
        self.busy.append(key)
        self.most = max(self.most, len(self.busy))
        self.passes.append(key)
        try:
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            return self.after
        finally:
            self.busy.remove(key)


async def settle() -> None:
    """Let the tasks run until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def with_queue(story: Callable[[WorkQueue, Work], Awaitable[None]], workers: int = 2) -> None:
    """Run a story with an open queue."""

    async def run() -> None:
        work = Work()
        queue = WorkQueue(work, workers)
        queue.start()
        queue.open()
        await story(queue, work)
        await queue.stop()

    asyncio.run(run())


def test_wishes_for_the_same_run_become_one() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        for _ in range(5):
            queue.wake(A)
        queue.wake(B)
        assert len(queue) == 2
        await settle()
        assert work.passes == [A, B]

    with_queue(story)


def test_a_wish_while_a_run_is_looked_at_makes_one_more_pass() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        work.gate.clear()
        queue.wake(A)
        await settle()
        for _ in range(3):
            queue.wake(A)
        await settle()
        assert work.passes == [A]
        work.gate.set()
        await settle()
        assert work.passes == [A, A]

    with_queue(story)


def test_runs_are_looked_at_side_by_side_up_to_the_workers() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        work.gate.clear()
        for name in "abcd":
            queue.wake(("art", name))
        await settle()
        assert (work.most, len(queue)) == (2, 2)
        work.gate.set()
        await settle()
        assert (len(work.passes), work.most) == (4, 2)

    with_queue(story)


def test_a_closed_queue_takes_wishes_and_does_nothing_until_it_is_opened() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        queue.close()
        queue.wake(A)
        queue.wake(A)
        await settle()
        assert work.passes == []
        queue.open()
        await settle()
        assert work.passes == [A]

    with_queue(story)


def test_a_run_is_looked_at_again_after_the_time_it_asked_for() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        work.after = 0.02
        queue.wake(A)
        await settle()
        assert work.passes == [A]
        work.after = None
        await asyncio.sleep(0.1)
        assert work.passes == [A, A]

    with_queue(story)


def test_the_nearest_time_counts_and_an_earlier_wish_replaces_it() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        queue.wake_after(A, 60)
        queue.wake_after(A, 0.02)
        queue.wake_after(A, 30)
        await asyncio.sleep(0.1)
        assert work.passes == [A]
        queue.wake_after(B, 0.02)
        queue.wake(B)
        await asyncio.sleep(0.1)
        assert work.passes == [A, B]

    with_queue(story)


def test_a_forgotten_run_is_not_looked_at() -> None:
    async def story(queue: WorkQueue, work: Work) -> None:
        queue.wake_after(A, 0.01)
        queue.forget(A)
        await asyncio.sleep(0.05)
        assert work.passes == []

    with_queue(story)


def test_failures_wait_longer_each_time_and_success_forgets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def story(queue: WorkQueue, work: Work) -> None:
        monkeypatch.setattr(queue, "wake_after", lambda key, seconds: waits.append(seconds))
        work.error = ValueError("broken")
        for _ in range(10):
            queue.wake(A)
            await settle()
        work.error = None
        queue.wake(A)
        await settle()
        work.error = ValueError("broken")
        queue.wake(A)
        await settle()

    with_queue(story)
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 0.5]


def test_a_run_that_fails_for_days_does_not_end_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    logging.disable(logging.CRITICAL)

    async def story(queue: WorkQueue, work: Work) -> None:
        monkeypatch.setattr(queue, "wake_after", lambda key, seconds: waits.append(seconds))
        work.error = ValueError("broken")
        for _ in range(1100):
            queue.wake(A)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        work.error = None
        queue.wake(B)
        await settle()
        assert work.passes[-1] == B

    try:
        with_queue(story, workers=1)
    finally:
        logging.disable(logging.NOTSET)
    assert len(waits) > 1050
    assert waits[-1] == LONGEST_BACKOFF_SECONDS


def test_stop_ends_timers_and_workers() -> None:
    async def run() -> None:
        work = Work()
        queue = WorkQueue(work)
        queue.start()
        queue.open()
        queue.wake_after(A, 0.01)
        await queue.stop()
        await asyncio.sleep(0.05)
        assert work.passes == []
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
