"""The cluster's processes: started with a log and a pid file each below the state folder, so that another process can end them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.network import Network

_STOP_SECONDS = 10.0
_LAZY = {"GOGC": "300"}  # garbage of Go is collected less often: a tenth less work for some hundred megabytes


class ClusterError(RuntimeError):
    """The cluster, or a part of it, did not come up. The message ends with the last lines of the log."""


@dataclass
class Daemons:
    """Processes by name. With `tied`, they die with the process that started them, however that one ends."""

    state: Path
    network: Network
    tied: bool
    _children: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str] | None = None,
        network: Network | None = None,
    ) -> None:
        """Start a process under `name`; in the cluster's network unless told otherwise; its command is kept for `restart`."""
        record = {"command": [*(network or self.network).prefix, *command], "environment": dict(environment or {})}
        (self.state / "commands").mkdir(exist_ok=True)
        (self.state / "commands" / f"{name}.json").write_text(json.dumps(record))
        self.restart(name)

    def restart(self, name: str) -> None:
        """Start the process called `name` again as it was started first. Raises when it runs or was never started."""
        path = self.state / "commands" / f"{name}.json"
        if not path.exists():
            known = sorted(found.stem for found in path.parent.glob("*.json"))
            raise ClusterError(f"no process is called {name!r}; this cluster has {', '.join(known)}")
        if self.is_running(name):
            raise ClusterError(f"{name} runs already (process {self.pid(name)})")
        record = json.loads(path.read_text())
        self._pid_folder.mkdir(exist_ok=True)
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                [*self.tie, *record["command"]],
                env={**os.environ, **_LAZY, **record["environment"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.state,
                start_new_session=True,
            )
        self._children[name] = child
        self._pid_file(name).write_text(f"{child.pid} {_start_time(child.pid)}")

    @property
    def tie(self) -> list[str]:
        """Before a command: the kernel kills it when the thread that started it has gone. Kept by exec, lost with new rights."""
        return ["setpriv", "--pdeathsig", "KILL"] if self.tied else []

    def stop(self, name: str, seconds: float = _STOP_SECONDS) -> None:
        """SIGTERM, after `seconds` SIGKILL. Nothing happens when it does not run."""
        self.signal(name, signal.SIGTERM)
        if not _holds(lambda: not self.is_running(name), seconds):
            self.signal(name, signal.SIGKILL)
            _holds(lambda: not self.is_running(name), seconds)
        self._pid_file(name).unlink(missing_ok=True)

    def signal(self, name: str, number: int) -> None:
        pid = self.pid(name)
        if pid is not None:
            os.kill(pid, number)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._pid_folder.glob("*.pid"))

    def pid(self, name: str) -> int | None:
        """The process's id, or None when it does not run. A pid that the kernel gave to somebody else does not count."""
        try:
            pid, started = (int(part) for part in self._pid_file(name).read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        child = self._children.get(name)
        if child is not None and child.pid == pid and child.poll() is not None:
            return None
        return pid if _start_time(pid) == started else None

    def is_running(self, name: str) -> bool:
        return self.pid(name) is not None

    def log(self, name: str) -> Path:
        return self.state / f"{name}.log"

    def wait_until(self, name: str, ready: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for `ready`; raises ClusterError when the process `name` ends before, or after `seconds`."""
        if _holds(lambda: ready() or not self.is_running(name), seconds) and self.is_running(name):
            return
        why = "ended" if not self.is_running(name) else f"was not ready within {seconds:.0f} s"
        last = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-10:])
        raise ClusterError(f"{name} {why}; the end of {self.log(name)}:\n{last}")

    @property
    def _pid_folder(self) -> Path:
        return self.state / "pids"

    def _pid_file(self, name: str) -> Path:
        return self._pid_folder / f"{name}.pid"


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for `condition`; raises ClusterError after `seconds`."""
    if not _holds(condition, seconds):
        raise ClusterError(f"{what}: not within {seconds:.0f} s")


def kill_all(pids: Callable[[], list[int]], seconds: float = _STOP_SECONDS) -> None:
    """SIGKILL to whatever `pids` lists, again and again until it lists nothing."""

    def none_left() -> bool:
        found = pids()
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return not found

    wait_for("processes did not end", none_left, seconds)


def is_alive(pid: int, started: int) -> bool:
    return _start_time(pid) == started


def own_identity() -> tuple[int, int]:
    """This process's id and start time, which together no other process ever has."""
    return os.getpid(), _start_time(os.getpid())


def _holds(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _start_time(pid: int) -> int:
    """In clock ticks since boot (field 22 of /proc/<pid>/stat); 0 when there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
