"""What makes an agent stop its ranks: a signal, the end of the process that started it, or a deadline."""

import os
import signal
import time
from types import FrameType

from atelier_api.exit_codes import MEANINGS, ExitCode


class StopRequest:
    """The first request counts; later ones change nothing. Takes over SIGTERM and SIGINT of this process."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._deadline: float | None = None
        self.at: float | None = None
        """Unix time of the request."""
        self.reason = MEANINGS[ExitCode.STOPPED].reason
        self.text = ""
        self._since = 0.0
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def not_after(self, seconds: int | None) -> None:
        """Ask for a stop this long from now; None: never."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def wanted(self) -> bool:
        """Whether a stop has been asked for by now."""
        if self.at is None and os.getppid() != self._parent:
            self._ask("the process that started the agent has ended")
        elif self.at is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "DeadlineExceeded"
            self._ask("spec.schedule.activeDeadlineSeconds is over")
        return self.at is not None

    @property
    def seconds_ago(self) -> float:
        """Time since the request."""
        return time.monotonic() - self._since

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.at is None:
            self._ask(f"stopped by {signal.Signals(number).name}")

    def _ask(self, text: str) -> None:
        self._since, self.text = time.monotonic(), text
        self.at = time.time()
