"""A child process with everything below it: started, stopped once, killed as a whole, reaped. Fit for a process with PID 1."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import psutil  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

# <sys/prctl.h>
_SET_PARENT_DEATH_SIGNAL = 1
_SET_NAME = 15
_SET_CHILD_SUBREAPER = 36


def ask_for_signal_when_parent_dies(number: signal.Signals) -> None:
    """The kernel sends this process `number` when the process that started it ends. Does nothing outside Linux."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, number)


def adopt_orphans() -> None:
    """Orphans below this process become its children, so that it can wait for them, as PID 1 does anyway. Linux only."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def name_this_process(name: str) -> None:
    """What `ps` and `top` call this process; 15 bytes at most are kept. Does nothing outside Linux."""
    _prctl(_SET_NAME, ctypes.c_char_p(name.encode()))


def _prctl(option: int, value: int | ctypes.c_char_p) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        log.warning("prctl refused", extra={"option": option, "error": os.strerror(ctypes.get_errno())})


class ProcessGroup:
    """A running child, in a session of its own: a terminal's Ctrl-C reaches it only through us."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status of the child, None while it runs. Reaps every other child that has ended."""
        while self._status is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._process.pid:
                self._status = os.waitstatus_to_exitcode(status)
                self._process.returncode = self._status  # subprocess must not wait for it a second time
        return self._status

    def has_children(self) -> bool:
        """Whether a process is left below the child."""
        return self.poll() is None and bool(psutil.Process(self._process.pid).children())

    def terminate(self) -> None:
        """Ask the child to stop. Only the child: torchrun passes it on to its ranks."""
        if self.poll() is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to everything below, the child first: it can start nothing anew. Ranks have sessions of their own."""
        if self.poll() is not None:
            return
        below = psutil.Process(self._process.pid).children(recursive=True)
        os.kill(self._process.pid, signal.SIGKILL)
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
