"""`atelier run` with real agents and torchrun; the ranks train nothing (`fake_launch`)."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from atelier_api.exit_codes import ExitCode
from atelier_api.run_file import RunFile
from atelier_runtime.observe.progress import read_progress
from atelier_runtime.observe.scratch import Scratch
from runs import LocalRun, demo_run

pytestmark = pytest.mark.processes

PATIENCE_SECONDS = 240.0
OPTIONS = ("--launch-module", "fake_launch", "--set", "retry.backoffSeconds=0")
ONE_RANK = ("--set", "parallelism.processesPerNode=1")


class Command:
    """A running command and what it has printed."""

    def __init__(self, run: LocalRun, ranks: str, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support"), "FAKE_RANKS": ranks}
        self.run = run
        self.scratch = Scratch(run.scratch)
        self.process = subprocess.Popen(
            run.command(*OPTIONS, *arguments),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stdout, self.stderr = "", ""

    def wait(self) -> int:
        self.stdout, self.stderr = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode

    def trained(self) -> None:
        """Wait until rank 0 has made all its steps."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            progress = read_progress(self.scratch.progress)
            if progress is not None and progress.checkpoint is not None:
                return
            time.sleep(0.05)
        raise AssertionError(f"the ranks never trained: {self.process.poll()}")

    def end(self) -> None:
        if self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.communicate()


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        command.end()


@pytest.fixture(scope="module")
def announced(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalRun, str]]:
    """A run that the command has brought to its end, and what it printed."""
    run = demo_run(base_folder, tmp_path_factory.mktemp("announced"))
    command = Command(run, "done")
    try:
        assert command.wait() == 0, command.stderr
        assert command.stderr == ""
        yield run, command.stdout
    finally:
        command.end()


def test_a_run_is_announced_followed_and_its_results_are_named(announced: tuple[LocalRun, str]) -> None:
    local_run, text = announced
    for line in (
        "adapter    LoRA of rank 4, alpha 8, on attention",
        "strategy   DDP, 2 processes on the CPU",
        f"store      {local_run.folder} (new)",
        "data: found 9, unreadable 1, kept 8",
        "checkpoint at step 10 (1000 B)",
        f"samples: {local_run.folder}/samples/00000010",
        f"weights  {local_run.folder}/exports/diffusers/pytorch_lora_weights.safetensors",
        f"report   {local_run.folder}/report.html",
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("{(local_run.path.parent / "base").resolve()}")',
    ):
        assert line in text
    assert re.search(r"memory     \d+ MiB predicted of ", text)


def test_the_same_file_goes_on_with_the_next_attempt_and_refuses_another_run(
    announced: tuple[LocalRun, str], commands: list[Command]
) -> None:
    local_run, _ = announced
    commands.append(changed := Command(local_run, "done", "--set", "adapter.rank=8"))
    assert changed.wait() == ExitCode.CONFIG
    assert changed.stderr.splitlines() == [
        "error: spec.adapter.rank is 8, it was 4",
        "error: run demo has been trained with other settings; change them back, give the run another metadata.name, "
        "or start anew with --fresh",
    ]
    commands.append(second := Command(local_run, "done", *ONE_RANK, "--set", "hyperparameters.steps=12"))
    assert second.wait() == 0
    assert "(goes on from what is there)" in second.stdout
    assert RunFile.read(local_run.folder / "run.json").attempt == "2.0"
    commands.append(fresh := Command(local_run, "done", *ONE_RANK, "--fresh", "--quiet", "--set", "adapter.rank=8"))
    assert fresh.wait() == 0
    assert (fresh.stdout, fresh.stderr) == ("", "")
    assert [path.name for path in (local_run.folder / "manifests").iterdir()] == ["00000010-3.0.json"]
    assert (local_run.folder / "exports").exists()


@pytest.fixture(scope="module")
def interrupted(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Command, Command]]:
    """A command that Ctrl-C has stopped while its ranks trained, and a second one of the same run that was started before."""
    first = Command(demo_run(base_folder, tmp_path_factory.mktemp("interrupted")), "wait")
    try:
        first.trained()
        second = Command(first.run, "done")
        second.wait()
        first.process.send_signal(signal.SIGINT)
        first.wait()
        yield first, second
    finally:
        first.end()


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(interrupted: tuple[Command, Command]) -> None:
    command, _ = interrupted
    assert command.process.returncode == ExitCode.STOPPED
    assert "stopping after this step, with a checkpoint; Ctrl-C again kills" in command.stdout
    assert f"checkpoint at step 10; `atelier run {command.run.path}` goes on from there" in command.stdout
    assert command.stderr == ""


def test_a_second_command_of_the_run_is_refused_with_the_first_ones_process(
    interrupted: tuple[Command, Command],
) -> None:
    first, second = interrupted
    assert second.process.returncode == ExitCode.CONFIG
    expected = f"error: run demo is being trained by process {first.process.pid} on this machine; wait for it or stop it first\n"
    assert second.stderr == expected


def test_a_second_ctrl_c_kills_and_leaves_nothing_behind(local_run: LocalRun, commands: list[Command]) -> None:
    commands.append(command := Command(local_run, "hang"))
    command.trained()
    below = psutil.Process(command.process.pid).children(recursive=True)
    command.process.send_signal(signal.SIGINT)
    printed = threading.Thread(
        target=lambda: [None for line in iter(command.process.stdout.readline, "") if "stopping" in line]
    )  # type: ignore[union-attr]
    printed.start()
    time.sleep(1)
    command.process.send_signal(signal.SIGINT)
    printed.join(PATIENCE_SECONDS)
    assert command.process.wait(PATIENCE_SECONDS) == ExitCode.INTERNAL
    assert "killed by the second Ctrl-C" in command.process.stderr.read()  # type: ignore[union-attr]
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive


def test_a_failed_rank_is_told_with_its_message_and_its_log(local_run: LocalRun, commands: list[Command]) -> None:
    commands.append(command := Command(local_run, "wait,broken", "--set", "retry.maxRestarts=0"))
    assert command.wait() == ExitCode.INTERNAL
    lines = command.stderr.splitlines()
    assert lines[0].startswith("last lines of rank 1 (")
    assert any("ZeroDivisionError: division by zero" in line for line in lines)
    assert lines[-1].startswith("error: rank 1: division by zero (step 7); this is a bug of atelier")


def test_two_nodes_are_restarted_together(local_run: LocalRun, commands: list[Command]) -> None:
    commands.append(command := Command(local_run, "lost,broken;done", "--set", "parallelism.nodes=2", *ONE_RANK))
    assert command.wait() == 0, command.stderr
    assert "restarting all nodes in 0 s, 3 restarts left: division by zero" in command.stdout
    attempts = sorted(path.name for path in (local_run.scratch / "attempts").iterdir())
    assert attempts == ["1.0-node-0.json", "1.0-node-1.json", "1.1-node-0.json", "1.1-node-1.json"]
    assert json.loads((local_run.folder / "run.json").read_text())["attempt"] == "1.1"


def test_a_killed_command_takes_its_agents_along(local_run: LocalRun, commands: list[Command]) -> None:
    commands.append(command := Command(local_run, "wait"))
    command.trained()
    below = psutil.Process(command.process.pid).children(recursive=True)
    command.process.kill()
    command.wait()
    _, alive = psutil.wait_procs(below, timeout=PATIENCE_SECONDS)
    assert not alive
