"""Bytes of a download, told as they come."""

import threading
from collections.abc import Callable
from typing import Any

from s3transfer.subscribers import BaseSubscriber


class ByteCounter(BaseSubscriber):
    """Passes the bytes of one file on; what an earlier try has brought is taken back when another begins."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._come = 0

    def start_over(self) -> None:
        """The file is fetched from its beginning."""
        with self._lock:
            come, self._come = self._come, 0
        if come:
            self._progress(-come)

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        """Called by the client from its threads; negative where it repeats a part."""
        with self._lock:
            self._come += bytes_transferred
        self._progress(bytes_transferred)
