"""The nodes of a run on this machine: one agent each, started by torchx as a cluster would start the pods."""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from torchx.runner import Runner
from torchx.schedulers.local_scheduler import create_scheduler
from torchx.specs import AppDef, AppState, Resource, Role, is_terminal, macros

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_api.run_file import RunFile
from atelier_runtime.node import holder
from atelier_runtime.observe.scratch import Scratch

SCHEDULER = "local_cwd"
# A node whose peers have failed has this long to notice by itself.
LOST_PEER_SECONDS = 30.0


class Gang:
    """All nodes of one attempt. Use as a context: whatever is left is killed at the end."""

    def __init__(self, run_file: RunFile, *, launch_module: str, lost_peer_seconds: float = LOST_PEER_SECONDS) -> None:
        self._run_file = run_file
        self._launch_module = launch_module
        self._lost_peer_seconds = lost_peer_seconds
        self._scratch = Scratch(Path(run_file.scratch))
        self._nodes = range(run_file.plan.nodes)
        self._asked: set[int] = set()
        self._stopping = False
        self._first_failure_at: float | None = None
        logging.getLogger("torchx").setLevel(logging.ERROR)
        self._runner = Runner("atelier", {SCHEDULER: create_scheduler})
        self._handle = ""

    def __enter__(self) -> "Gang":
        for node in self._nodes:
            self._scratch.result(node).unlink(missing_ok=True)
        path = self._scratch.root / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run_file.write(path)
        options = {"log_dir": str(self.log_folder), "auto_set_cuda_visible_devices": len(self._nodes) > 1}
        self._handle = self._runner.run(self.app(path), SCHEDULER, options)
        return self

    def __exit__(self, *_: object) -> None:
        if self.running():
            self.kill()
        self._runner.close()

    @property
    def log_folder(self) -> Path:
        """Below it lies the output of every agent."""
        return self._scratch.root / "agents"

    def app(self, path: Path) -> AppDef:
        """The run as torchx sees it: the command is the one that a pod has."""
        plan = self._run_file.plan
        command = ["-m", "atelier_runtime.agent", "--run-file", _literal(str(path)), "--node-rank", macros.replica_id]
        command += ["--rendezvous", f"localhost:{free_port()}", "--port", "0", "--launch-module", self._launch_module]
        # torchx deals the GPUs out by this number; a single node sees all that the user lets it see.
        gpus = plan.processes_per_node if plan.device == "cuda" and plan.nodes > 1 else 0
        node = Role(
            name="node",
            image="",
            entrypoint=sys.executable,
            args=command,
            num_replicas=plan.nodes,
            resource=Resource(cpu=1, gpu=gpus, memMB=1),
        )
        return AppDef(name=self._run_file.identity.name, roles=[node])

    def running(self) -> bool:
        """Whether a node is left. Passes a stop on to nodes that have come up since, and ends nodes whose peers have failed."""
        status = self._runner.status(self._handle)
        if status is None or is_terminal(status.state):
            return False
        failed = any(result is not None and result.exit_code is not ExitCode.DONE for result in self._known_results())
        if failed and self._first_failure_at is None:
            self._first_failure_at = time.monotonic()
        if self._first_failure_at is not None and time.monotonic() - self._first_failure_at > self._lost_peer_seconds:
            self._stopping = True
        if self._stopping:
            self._ask()
        return status.state is AppState.RUNNING

    def stop(self) -> None:
        """Ask every node once to stop, with a checkpoint."""
        self._stopping = True
        self._ask()

    def kill(self) -> None:
        """SIGKILL to the agents and everything below them."""
        for node in self._nodes:
            agent = holder(self._scratch.lock(node))
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (
                    [*psutil.Process(agent).children(recursive=True), psutil.Process(agent)] if agent else []
                ):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    def results(self) -> list[AgentResult]:
        """Why each node left, in the order of the nodes."""
        return [result or self._lost(node) for node, result in zip(self._nodes, self._known_results(), strict=True)]

    def port(self) -> int | None:
        """Port of node 0's agent, once it serves."""
        try:
            return int(self._scratch.port(0).read_text())
        except (OSError, ValueError):
            return None

    def _known_results(self) -> list[AgentResult | None]:
        return [read_result(self._scratch.result(node)) for node in self._nodes]

    def _ask(self) -> None:
        for node in self._nodes:
            agent = holder(self._scratch.lock(node))
            if agent and node not in self._asked:
                self._asked.add(node)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(agent, signal.SIGTERM)

    def _lost(self, node: int) -> AgentResult:
        code = ExitCode.INTERNAL
        logs = sorted(self.log_folder.glob(f"*/*/node/{node}/combined.log"), key=lambda path: path.stat().st_mtime)
        where = f"; its log is {logs[-1]}" if logs else ""
        message = f"the agent of node {node} was killed or could not start{where}"
        return AgentResult(
            exit_code=code,
            reason=MEANINGS[code].reason,
            message=message,
            attempt=self._run_file.attempt,
            time=time.time(),
        )


def read_result(path: Path) -> AgentResult | None:
    """The terminal facts of a node; None while there are none."""
    try:
        return AgentResult.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def decisive(results: list[AgentResult]) -> AgentResult:
    """The result that the run has: the earliest failure that is not a lost peer or a stop, else a lost peer, else a stop."""
    order = {ExitCode.DONE: 3, ExitCode.STOPPED: 2, ExitCode.COLLECTIVE_TIMEOUT: 1}
    return min(results, key=lambda result: (order.get(result.exit_code, 0), result.time))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _literal(text: str) -> str:
    """torchx fills in `$` and `${}` in arguments."""
    return text.replace("$", "$$")
