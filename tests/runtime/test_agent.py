"""The agent with a real torchrun and ranks that train nothing: exit codes, restarts, stops, what it serves and leaves."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from atelier_api.exit_codes import ExitCode
from atelier_api.result import AgentResult
from atelier_runtime.observe.failure import read_failures
from atelier_runtime.observe.progress import read_progress
from atelier_runtime.observe.scratch import Scratch
from run_files import run_file

SUPPORT = Path(__file__).parents[1] / "support"
PATIENCE_SECONDS = 120.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition, which may take long on a busy machine."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


@dataclass
class Node:
    """An agent as a process, and the scratch folder of its run."""

    folder: Path
    scratch: Scratch = field(init=False)
    process: "subprocess.Popen[str] | None" = None

    def __post_init__(self) -> None:
        self.scratch = Scratch(self.folder)

    def start(
        self,
        ranks: str,
        *,
        processes: int = 1,
        node_rank: int = 0,
        nodes: int = 1,
        rendezvous: str = "localhost:0",
        **spec: Any,
    ) -> None:
        path = self.folder / f"run-{node_rank}.json"
        quick = {"retry": {"backoffSeconds": 0, "maxRestarts": 1}, "schedule": {"terminationGraceSeconds": 60}}
        run_file(self.folder, processes=processes, nodes=nodes, **{**quick, **spec}).write(path)
        command = [
            sys.executable,
            "-m",
            "atelier_runtime.agent",
            "--run-file",
            str(path),
            "--launch-module",
            "fake_launch",
        ]
        command += [
            "--node-rank",
            str(node_rank),
            "--rendezvous",
            rendezvous,
            "--termination-message",
            str(self.folder / "termination"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "FAKE_RANKS": ranks}
        self.log = (self.folder / f"agent-{node_rank}.log").open("w+")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log, text=True)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE_SECONDS)

    @property
    def result(self) -> AgentResult:
        return AgentResult.model_validate_json((self.folder / "termination").read_bytes())

    def trained(self) -> None:
        """Wait until rank 0 has made all its steps."""
        until(lambda: (progress := read_progress(self.scratch.progress)) and progress.checkpoint, "the steps of rank 0")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Node]:
    """A node that leaves no process behind."""
    started = Node(folder)
    try:
        yield started
    finally:
        if started.process is not None and started.process.poll() is None:
            for process in [*psutil.Process(started.process.pid).children(recursive=True), started.process]:
                process.kill()
            started.process.wait()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running(tmp_path) as started:
        yield started


def test_importing_the_agent_imports_no_torch() -> None:
    code = (
        "import sys, atelier_runtime.agent; print(sorted({'torch', 'diffusers', 'numpy', 'boto3'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_file_that_is_no_run_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    arguments = ["--run-file", str(tmp_path / "run.json"), "--termination-message", str(tmp_path / "message")]
    ended = subprocess.run([sys.executable, "-m", "atelier_runtime.agent", *arguments], capture_output=True, text=True)
    assert ended.returncode == ExitCode.CONFIG
    assert "which is no RunFile" in AgentResult.model_validate_json((tmp_path / "message").read_bytes()).message
    assert "Traceback" not in ended.stderr


@pytest.mark.processes
def test_a_config_error_is_not_tried_again(node: Node) -> None:
    node.start("config,wait", processes=2)
    assert node.wait() == ExitCode.CONFIG
    assert node.result.message == "spec.adapter.targets is ['foo']; no module of the denoiser matches"
    assert (node.result.rank, node.result.attempt, node.result.reason) == (0, "1.0", "InvalidConfig")
    assert read_progress(node.scratch.progress).stage == "Failed"  # type: ignore[union-attr]


@pytest.mark.processes
def test_a_killed_rank_is_restarted_with_the_next_attempt_whose_end_leaves_the_facts(node: Node) -> None:
    node.start("killed,wait;done", processes=2)
    assert node.wait() == ExitCode.DONE
    assert (node.result.attempt, node.result.reason) == ("1.1", "Completed")
    assert (node.result.step, node.result.checkpoint_step) == (10, 10)
    assert [each.key for each in node.result.artifacts] == ["exports/x.safetensors"]
    assert read_progress(node.scratch.progress).stage == "Succeeded"  # type: ignore[union-attr]
    assert AgentResult.model_validate_json(node.scratch.result(0).read_bytes()) == node.result
    assert not node.scratch.port(0).exists()
    (output,) = node.scratch.logs("1.1", 0).glob("*/attempt_0/1/stderr.log")
    assert output.read_text() == "environment 3 1\n", "threads of the plan, and no downloads for a model on the disk"
    assert json.loads(node.scratch.run_file("1.1", 0).read_text())["attempt"] == "1.1"
    lines = [
        line for line in (node.folder / "agent-0.log").read_text().splitlines() if line.strip() != "environment 3 1"
    ]
    assert {"starting the ranks", "restarting", "leaving"} <= {json.loads(line)["message"] for line in lines}, (
        "every line is JSON"
    )


@pytest.mark.processes
def test_the_cause_is_not_hidden_by_a_peer_that_lost_it(node: Node) -> None:
    """In the only restart that there may be: the message says that they have run out."""
    node.start("killed,wait;lost,broken", processes=2)
    assert node.wait() == ExitCode.INTERNAL
    assert (node.result.rank, node.result.step, node.result.attempt) == (1, 7, "1.1")
    assert node.result.message == "division by zero (after 1 restarts, spec.retry.maxRestarts)"


@dataclass(frozen=True)
class Stopped:
    """What was seen of an agent whose ranks had trained and waited, until a signal stopped it."""

    pid: int
    metrics: str
    progress: dict[str, Any]
    second: "subprocess.CompletedProcess[str]"
    second_message: str
    exit_code: int
    result: AgentResult
    stage: str


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    with running(tmp_path_factory.mktemp("stopped")) as node:
        node.start("wait", processes=2)
        node.trained()
        assert node.process is not None
        base = f"http://127.0.0.1:{node.scratch.port(0).read_text()}"

        def rank_one_counted() -> str | None:
            text = urllib.request.urlopen(f"{base}/metrics", timeout=10).read().decode()
            return text if 'rank="1"' in text else None

        metrics = until(rank_one_counted, "the numbers of rank 1")
        progress = json.loads(urllib.request.urlopen(f"{base}/progress", timeout=10).read())
        arguments = ["--run-file", str(node.folder / "run-0.json")]
        arguments += ["--termination-message", str(node.folder / "second")]
        command = [sys.executable, "-m", "atelier_runtime.agent", *arguments]
        second = subprocess.run(command, capture_output=True, text=True)
        node.signal(signal.SIGTERM)
        exit_code = node.wait()
        last = read_progress(node.scratch.progress)
        assert last is not None
        return Stopped(
            pid=node.process.pid,
            metrics=metrics,
            progress=progress,
            second=second,
            second_message=(node.folder / "second").read_text(),
            exit_code=exit_code,
            result=node.result,
            stage=last.stage,
        )


@pytest.mark.processes
def test_a_stop_ends_with_75(stopped: Stopped) -> None:
    assert stopped.exit_code == ExitCode.STOPPED
    assert stopped.result.message == "stopped by SIGTERM"
    assert (stopped.result.reason, stopped.result.step, stopped.result.checkpoint_step) == ("Stopped", 10, 10)
    assert stopped.stage == "Stopped"


@pytest.mark.processes
def test_a_second_agent_of_a_run_is_refused_with_the_first_ones_process(stopped: Stopped) -> None:
    assert stopped.second.returncode == ExitCode.CONFIG
    assert f"being trained by process {stopped.pid} on this machine" in stopped.second_message


@pytest.mark.processes
def test_metrics_and_progress_are_served_while_the_ranks_run(stopped: Stopped) -> None:
    assert 'atelier_train_step{namespace="default",run="demo"} 10.0' in stopped.metrics
    assert stopped.progress["step"] == 10


@pytest.mark.processes
def test_a_stop_before_there_are_ranks_ends_with_75(node: Node) -> None:
    node.start("done")
    until(node.scratch.lock(0).exists, "the agent")
    node.signal(signal.SIGTERM)
    assert node.wait() == ExitCode.STOPPED


@pytest.mark.processes
def test_a_peer_lost_while_stopping_is_still_a_stop(node: Node) -> None:
    node.start("stop-and-lose-peer")
    node.trained()
    node.signal(signal.SIGTERM)
    assert node.wait() == ExitCode.STOPPED
    assert read_failures(node.scratch.failures("1.0"))[0].exit_code is ExitCode.COLLECTIVE_TIMEOUT


@pytest.mark.processes
def test_ranks_that_do_not_stop_are_killed_after_the_grace(node: Node) -> None:
    node.start("hang", processes=2, schedule={"terminationGraceSeconds": 5})
    node.trained()
    assert node.process is not None
    below = psutil.Process(node.process.pid).children(recursive=True)
    assert len(below) >= 3
    node.signal(signal.SIGTERM)
    assert node.wait() == ExitCode.INTERNAL
    assert node.result.message == "the ranks did not stop within 4 s and were killed"
    assert not [process for process in below if process.is_running()]


@pytest.mark.processes
def test_the_deadline_stops_the_run(node: Node) -> None:
    node.start("wait", schedule={"activeDeadlineSeconds": 6, "terminationGraceSeconds": 60})
    assert node.wait() == ExitCode.STOPPED
    assert node.result.reason == "DeadlineExceeded"


@pytest.mark.processes
def test_a_stop_ends_the_pause_before_a_restart(node: Node) -> None:
    node.start("killed", retry={"backoffSeconds": 3600})
    until(
        lambda: (
            (progress := read_progress(node.scratch.progress))
            and progress.detail == "restart 1 of 3 in 3600 s: killed by SIGKILL (out of memory killer?)"
        ),
        "the pause",
    )
    node.signal(signal.SIGINT)
    assert node.wait() == ExitCode.STOPPED
    assert node.result.message == "stopped by SIGINT"


@pytest.mark.processes
def test_the_ranks_stop_when_the_agent_is_killed(node: Node) -> None:
    node.start("wait", processes=2)
    node.trained()
    assert node.process is not None
    below = psutil.Process(node.process.pid).children(recursive=True)
    node.signal(signal.SIGKILL)
    node.wait()
    until(
        lambda: not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE],
        "the ranks to stop",
    )


@pytest.mark.processes
def test_two_nodes_agree_on_the_cause_and_leave_the_restart_to_their_gang(tmp_path: Path, node: Node) -> None:
    other = Node(tmp_path)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = f"localhost:{probe.getsockname()[1]}"
    try:
        node.start("done,broken", nodes=2, rendezvous=meeting)
        other.start("done,broken", nodes=2, node_rank=1, rendezvous=meeting)
        assert other.wait() == ExitCode.INTERNAL
        second = AgentResult.model_validate_json(node.scratch.result(1).read_bytes())
        assert (second.rank, second.message) == (1, "division by zero")
        node.signal(signal.SIGTERM)
        node.wait()
        assert not node.scratch.run_file("1.1", 0).exists()
    finally:
        if other.process is not None and other.process.poll() is None:
            other.process.kill()
