"""The operator as a process group that is started many times: forked from a process that has imported it already.

Half of a start is imports. What runs is `atelier_operator.main.main` with the environment that the chart would give it.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["atelier_operator.main"])


def _serve(environment: dict[str, str], log: str) -> None:
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    from kubernetes.aio.config import kube_config

    from atelier_operator.main import main

    kube_config.KUBE_CONFIG_DEFAULT_LOCATION = environment["KUBECONFIG"]  # it was read at import
    main()


class ForkedOperator:
    """One replica; started again it has the same identity, as a container that is restarted in its pod, and its Lease at once."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment = dict(environment)
        self.log = log
        self._process: Any = None
        self.starts = 0

    def start(self) -> None:
        self._process = _CONTEXT.Process(target=_serve, args=(self._environment, str(self.log)), daemon=True)
        self._process.start()
        self.starts += 1

    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL to the process group."""
        pid = self._process.pid
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()  # it has no group of its own yet, or has ended
        end = time.monotonic() + 10
        while self._process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""
