"""Work in a forked process that is killed in the middle of it, as a node that loses power would."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from atelier_runtime.store import Store

_CHANGING = {"put_bytes", "put_file", "delete", "remove_unfinished"}


def in_fork(
    work: Callable[[], object], *, kill_after: float | None = None, counted_from: Callable[[], bool] | None = None
) -> int:
    """Run `work` in a fork and kill it after so many seconds, counted from when `counted_from` is true, if it still runs.

    Gives 0, 1 (it raised) or minus the signal.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 240
    while counted_from is not None and not counted_from() and time.monotonic() < deadline:
        time.sleep(0.02)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def die_in(seconds: float) -> None:
    """End this process so much later as a kill would: the kernel does it, and no code of ours runs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))


class KillingStore:
    """A store whose process is killed at the `nth` operation that changes it, before or after the operation."""

    def __init__(self, store: Store, nth: int, *, before: bool) -> None:
        self._store = store
        self._left = nth
        self._before = before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in _CHANGING:
            return method

        def counted(*arguments: Any, **settings: Any) -> Any:
            self._left -= 1
            if self._left == 0 and self._before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments, **settings)
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


def pauses(count: int, low: float, high: float, *, seed: int) -> list[float]:
    """Random moments for kills, from a printed seed."""
    print(f"seed of the kills: {seed}")
    draws = random.Random(seed)
    return [draws.uniform(low, high) for _ in range(count)]


def spread_pauses(count: int, high: float, *, seed: int) -> list[float]:
    """A random moment in each of `count` equal parts of the time from 0 to `high`, from a printed seed."""
    return [part * high / count for part in map(sum, zip(range(count), pauses(count, 0, 1, seed=seed), strict=True))]


def acknowledge(path: Path, step: int) -> None:
    """Append a step to a file, as a process does that tells others of a committed checkpoint."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, f"{step}\n".encode())
    os.close(descriptor)


def acknowledged(path: Path) -> list[int]:
    """The steps in such a file."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int) -> None:
    """Half a minute at most."""
    for _ in range(600):
        if not is_running(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")
