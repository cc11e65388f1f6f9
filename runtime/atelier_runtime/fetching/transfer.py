"""Several files at a time, with a count of bytes, a check of the disk, and an end as soon as it is asked for."""

import contextlib
import errno
import fcntl
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atelier_api.errors import ConfigError, StoreError

WORKERS = 4
LOOK_SECONDS = 0.25
END_SECONDS = 2.0
"""Time for threads to end by themselves after an error."""

SPARE_BYTES = 64 << 20
"""Room that is left on the disk: configs, links and what others write meanwhile."""


class Watch(Protocol):
    """Who is told how far a download is. Called from one thread."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def show(self, done: int, total: int) -> None:
        """Bytes that are here, and all that are needed."""


class Cancelled(BaseException):
    """The download is to end: raised inside its threads, never out of `run`. Not an Exception, so that no retry takes it."""


class Meter:
    """Counts bytes of all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._cancelled = False

    @property
    def done(self) -> int:
        return self._done

    def add(self, count: int) -> None:
        """Bytes that have come; negative ones come again. Raises Cancelled once the download is to end."""
        if self._cancelled:
            raise Cancelled
        with self._lock:
            self._done += count

    def cancel(self) -> None:
        """End every thread at its next bytes."""
        self._cancelled = True


@dataclass(frozen=True)
class Transfer:
    """One file to fetch. `here`: bytes of it that are on the disk already."""

    size: int
    here: int
    fetch: Callable[[Meter], None]


def run(transfers: Sequence[Transfer], watch: Watch) -> None:
    """Fetch everything. The first error ends the others and is raised; so does an interrupt, and what is here stays."""
    meter = Meter()
    total = sum(transfer.size for transfer in transfers)
    meter.add(sum(transfer.here for transfer in transfers))
    # The largest first: a large file that begins last would be waited for alone.
    waiting = deque(sorted(transfers, key=lambda transfer: -transfer.size))
    errors: list[BaseException] = []

    def work() -> None:
        while waiting:
            try:
                transfer = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                transfer.fetch(meter)
            except BaseException as error:
                errors.append(error)
                return

    # Daemons: a thread that waits for a silent server must not keep a process that the user has interrupted.
    threads = [threading.Thread(target=work, name=f"fetch-{index}", daemon=True) for index in range(WORKERS)]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            time.sleep(LOOK_SECONDS)
            watch.show(meter.done, total)
        if errors:
            raise errors[0]
        watch.show(meter.done, total)
    finally:
        waiting.clear()
        meter.cancel()
        for thread in threads:
            thread.join(END_SECONDS / WORKERS)


def check_space(needed: int, folder: Path, *, remedy: str) -> None:
    """Raise ConfigError where the disk of `folder` has less than `needed` bytes, and some to spare."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + SPARE_BYTES > free:
        raise ConfigError(
            f"{gigabytes(needed)} are to be fetched to {folder}, and its disk has {gigabytes(free)} free; "
            f"make room, or {remedy}"
        )


def disk_error(error: OSError, folder: Path) -> StoreError:
    """The sentence for a disk that fails."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(f"cannot write to {folder}: {'the disk is full' if full else error.strerror or error}")


@contextlib.contextmanager
def alone(lock: Path, watch: Watch) -> Iterator[None]:
    """Hold a lock file; waits while another process fetches the same."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    watch.note("another process fetches this model; waiting for it")
                told = True
                time.sleep(LOOK_SECONDS)
        yield


def gigabytes(size_bytes: int) -> str:
    """`12.3 GB`, `45 MB`: decimal, as hubs and disks count."""
    return f"{size_bytes / 1e9:.3g} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.3g} MB"
