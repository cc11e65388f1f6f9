"""One attempt on one node: the command and environment of torchrun, the files it leaves, and what they say."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

from atelier_api.errors import ConfigError
from atelier_api.exit_codes import ExitCode
from atelier_api.run_file import RunFile
from atelier_runtime.observe.failure import Failure, cause, read_endings, read_failures
from atelier_runtime.observe.metrics import RECOVER_UNTIL, STARTED_AT
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.process_group import ProcessGroup

# torchrun kills its ranks this long after a stop unless told otherwise; the agent decides that, so torchrun's time is longer.
_TORCHRUN_MARGIN_SECONDS = 60
_KILL_WAIT_SECONDS = 10.0
_LOCK_TRIES = 5


class Attempt:
    """One life of the node's process group."""

    group: ProcessGroup

    def __init__(self, run_file: RunFile, node_rank: int, rendezvous: str, launch_module: str) -> None:
        self._run_file = run_file
        self._node_rank = node_rank
        self._rendezvous = rendezvous
        self._launch_module = launch_module
        self._scratch = Scratch(Path(run_file.scratch))
        self._failures = self._scratch.failures(run_file.attempt)
        processes = run_file.plan.processes_per_node
        self._ranks = range(node_rank * processes, (node_rank + 1) * processes)

    def start(self, *, recover_until: int) -> None:
        """Write the RunFile of this attempt and start torchrun. `recover_until`: step that an earlier attempt had reached."""
        self._failures.mkdir(parents=True, exist_ok=True)
        # An attempt of this name may have left files in a scratch folder that outlived its store.
        for name in [*(f"rank-{rank}.json" for rank in self._ranks), f"endings-{self._node_rank}.json"]:
            (self._failures / name).unlink(missing_ok=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._run_file.write(self._path)
        self._scratch.metrics(self._node_rank).mkdir(parents=True, exist_ok=True)
        self.group = ProcessGroup(self.command(), self.environment(os.environ, recover_until=recover_until))

    def command(self) -> list[str]:
        """torchrun's command line."""
        plan, grace = self._run_file.plan, self._run_file.spec.schedule.termination_grace_seconds
        wrapper = [sys.executable, "-m", "atelier_runtime.torchrun"]
        wrapper += [
            "--endings",
            str(self._failures),
            "--node-rank",
            str(self._node_rank),
            "--first-rank",
            str(self._ranks.start),
            "--",
        ]
        group = [f"--nnodes={plan.nodes}", f"--nproc-per-node={plan.processes_per_node}", "--max-restarts=0"]
        if plan.nodes == 1:
            group += ["--standalone", "--local-addr=localhost"]
        else:
            # Static: global ranks follow the node ranks, so that rank 0 is where node 0's agent is.
            host, _, port = self._rendezvous.rpartition(":")
            group += [f"--node-rank={self._node_rank}", f"--master-addr={host}", f"--master-port={port}"]
            group += [f"--rdzv-id={self._run_file.identity.uid}-{self._run_file.attempt}"]
        logs = self._scratch.logs(self._run_file.attempt, self._node_rank)
        group += [f"--shutdown-timeout={grace + _TORCHRUN_MARGIN_SECONDS}", f"--log-dir={logs}", "--tee=3"]
        return [*wrapper, *group, "-m", self._launch_module, "--run-file", str(self._path)]

    def environment(self, base: Mapping[str, str], *, recover_until: int) -> dict[str, str]:
        """What torchrun and the ranks see beside `base`."""
        environment = {
            **base,
            "PROMETHEUS_MULTIPROC_DIR": str(self._scratch.metrics(self._node_rank)),
            STARTED_AT: str(time.time()),
            RECOVER_UNTIL: str(recover_until),
            "PYTHONUNBUFFERED": "1",
            # torchrun puts this in front of every line of a rank; its default would break JSON lines.
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": " ",
        }
        if self._run_file.plan.threads_per_process:
            environment["OMP_NUM_THREADS"] = str(self._run_file.plan.threads_per_process)
        if Path(self._run_file.model_folder).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"  # nothing is left to fetch; a missing file is an error, not a download
        return environment

    def cause(self, stopped_at: float | None) -> Failure | None:
        """Why the attempt failed; None when it was done, or left as it was asked to."""
        status = self.group.poll()
        if status == 0 and stopped_at is None:
            return None
        failure = cause(read_failures(self._failures), read_endings(self._failures), stopped_at=stopped_at)
        if failure is None and stopped_at is None:
            how = f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
            message = f"torchrun ended ({how}) without a reason; its log tells more"
            return Failure(
                rank=self._ranks.start, time=time.time(), exit_code=ExitCode.INTERNAL, error="torchrun", message=message
            )
        return failure

    @property
    def _path(self) -> Path:
        return self._scratch.run_file(self._run_file.attempt, self._node_rank)


def kill_descendants() -> None:
    """SIGKILL to whatever is left below this process, and wait for it."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_KILL_WAIT_SECONDS)


@contextlib.contextmanager
def hold_lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file with this process's id in it; the kernel frees it when the process ends, however it ends.

    Raises ConfigError, naming the other process, when it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not _locked(file):
            raise ConfigError(in_use(what, holder(path)))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    """Take the lock. Tries for a moment: who asks for the holder has it for an instant as well."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False


def in_use(what: str, process: int | None) -> str:
    """The sentence for a run that another process trains."""
    return f"{what} is being trained by process {process} on this machine; wait for it or stop it first"


def holder(path: Path) -> int | None:
    """Id of the process that holds a lock file; None when it is free."""
    try:
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read().strip() or 0)
    except OSError:
        pass
    return None
