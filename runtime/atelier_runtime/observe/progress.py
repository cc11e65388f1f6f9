"""Progress of a run as a small JSON file: rank 0 writes it, the node's agent serves it at `/progress`."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from atelier_api.progress import Progress

log = logging.getLogger(__name__)


class ProgressWriter:
    """Keeps the newest facts and writes them at most every `every_seconds`; a new stage is written at once.

    `path` None (ranks other than 0): nothing is written. A disk that is full does not stop the training: it is logged once.
    """

    def __init__(
        self, path: Path | None, every_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._every_seconds = every_seconds
        self._clock = clock
        self._fields: dict[str, Any] = {}
        self._written_at: float | None = None
        self._complained = False

    @property
    def is_due(self) -> bool:
        """Whether the next update writes. Who has facts that take time to work out may wait for it; `flush` does not."""
        if self._path is None:
            return False
        return self._written_at is None or self._clock() - self._written_at >= self._every_seconds

    def update(self, **fields: Any) -> None:
        """Take over fields of `Progress` by their Python names. A name or value that is none raises ValidationError at the write."""
        if self._path is None:
            return
        turn = "stage" in fields and fields["stage"] != self._fields.get("stage")
        self._fields.update(fields)
        if turn or self.is_due:
            self.flush()

    def flush(self) -> None:
        """Write now."""
        if self._path is None:
            return
        self._written_at = self._clock()
        progress = Progress(**{**self._fields, "updated_at": datetime.now(UTC).isoformat(timespec="seconds")})
        try:
            write_progress(self._path, progress)
        except OSError as problem:
            if not self._complained:
                log.warning("progress cannot be written", extra={"path": str(self._path), "error": str(problem)})
            self._complained = True


def write_progress(path: Path, progress: Progress) -> None:
    """Replace the file in one step: a reader sees the old message or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(progress.model_dump_json(by_alias=True))
    temporary.replace(path)


def read_progress(path: Path) -> Progress | None:
    """The newest message; None when there is none that can be read."""
    try:
        return Progress.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


class EtaEstimator:
    """Time left, from the median of recent steps: one slow step moves it little, a pause for samples or a checkpoint not at all."""

    def __init__(self, total_steps: int, window: int = 50) -> None:
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=window)

    def step_took(self, seconds: float) -> None:
        """Duration of one step, without pauses. The first step of a process (compiling, warming up) should be left out."""
        self._seconds.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """Median of the recent steps; None before the first."""
        return median(self._seconds) if self._seconds else None

    def eta_seconds(self, step: int) -> float | None:
        """Seconds from `step` to the last one; None before the first step."""
        seconds = self.step_seconds
        return None if seconds is None else max(0, self._total_steps - step) * seconds

    def samples_per_second(self, global_batch_size: int) -> float | None:
        """Speed while training; None before the first step."""
        seconds = self.step_seconds
        return global_batch_size / seconds if seconds else None
