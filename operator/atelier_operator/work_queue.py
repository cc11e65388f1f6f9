"""Runs that are to be looked at: each at most once at a time, wishes for the same run become one, failures wait longer each time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from atelier_operator.inventory import Key

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 60.0

Work = Callable[[Key], Awaitable[float | None]]
"""Looks at a run; gives the seconds after which it must be looked at again, if it must."""


class WorkQueue:
    """`work` is called by `workers` tasks."""

    def __init__(self, work: Work, workers: int = 8) -> None:
        self._work = work
        self._workers = workers
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._open = asyncio.Event()

    def start(self) -> None:
        """Take wishes in; work begins with `open`."""
        self._tasks = [asyncio.create_task(self._serve()) for _ in range(self._workers)]

    def open(self) -> None:
        """Begin, or go on, to work."""
        self._open.set()

    def close(self) -> None:
        """Stop before the next run; wishes are still taken in."""
        self._open.clear()

    async def stop(self) -> None:
        """End all tasks."""
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    def wake(self, key: Key) -> None:
        """Look at a run soon."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def wake_after(self, key: Key, seconds: float) -> None:
        """Look at a run after some time, unless it is looked at before."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def forget(self, key: Key) -> None:
        """The run is gone."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        self._failures.pop(key, None)

    def __len__(self) -> int:
        """Runs that are to be looked at now."""
        return len(self._queued)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.wake(key)

    async def _serve(self) -> None:
        while True:
            key = await self._ready.get()
            await self._open.wait()
            self._queued.discard(key)
            self._busy.add(key)
            try:
                after = await self._work(key)
                self._failures.pop(key, None)
            except Exception:
                after = self._backoff(key)
                log.exception("reconcile failed", extra={"run": key[1], "namespace": key[0], "again_seconds": after})
            finally:
                self._busy.discard(key)
            if key in self._again:
                self._again.discard(key)
                self.wake(key)
            elif after is not None:
                self.wake_after(key, after)

    def _backoff(self, key: Key) -> float:
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        return min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10), LONGEST_BACKOFF_SECONDS)
