"""Whole runs for tests: a folder with a tiny base checkpoint, real pictures and a YAML, trained by the real command or by forks."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from atelier_api.progress import Progress
from atelier_api.run_file import RunFile
from atelier_cli.follow import funnel_lines
from atelier_cli.machine import host, surroundings
from atelier_cli.run_source import load
from atelier_operator.planner.local import local_machine, resolve_local
from atelier_runtime.observe.failure import Failure, read_failures
from atelier_runtime.observe.progress import read_progress
from atelier_runtime.observe.scratch import Scratch
from atelier_runtime.store import ObjectMissing, open_store
from family_models import save_tiny
from processes import run_ranks

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(folder: Path, count: int, size: int = 32) -> Path:
    """`count` real handwritten digits as PNG with sidecar captions of unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    for index in range(count):
        grey = Image.fromarray((255 - digits.images[index] * 15.9).astype("uint8"))
        grey.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")
        tail = " in black ink on paper" if index % 2 else ""
        (folder / f"{index:04d}.txt").write_text(f"a handwritten {WORDS[digits.target[index]]}{tail}\n")
    return folder


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes` laid over it."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return result


@dataclass(frozen=True)
class LocalRun:
    """A run's YAML and where its results lie."""

    path: Path
    document: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run's folder in a local store."""
        return self.path.parent / "runs" / "default" / f"{self.document['metadata']['name']}-local"

    @property
    def scratch(self) -> Path:
        return self.path.parent / "runs" / ".scratch" / f"default-{self.document['metadata']['name']}"

    def changed(self, **spec: Any) -> "LocalRun":
        """The same file with parts of the spec changed."""
        return write_run(self.path, merged(self.document, {"spec": spec}))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "atelier_cli.main", "run", str(self.path), *arguments]

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        """Start the command in a process group of its own."""
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=dict(os.environ) | dict(environment or {}),
        )

    def train(self, *arguments: str, expect: int = 0, environment: Mapping[str, str] | None = None) -> str:
        """Run to the end and check the exit code; gives the output."""
        process = self.start(*arguments, environment=environment)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}:\n{output[-6000:]}"
        return output

    def resolved(self) -> RunFile:
        """As the command resolves the file, for the attempt after the one that the store knows."""
        loaded = load(self.path)
        machine = local_machine(loaded.spec, host())
        run_file = resolve_local(loaded, machine=machine, around=surroundings(self.path))
        try:
            before = open_store(run_file.store_uri, run_file.spec.storage.s3).get_bytes("run.json")
        except ObjectMissing:
            return run_file
        attempt = int(RunFile.model_validate_json(before).attempt.partition(".")[0]) + 1
        return run_file.model_copy(update={"attempt": f"{attempt}.0"})

    def train_in_forks(self) -> None:
        """Run to the end with ranks that are forks: for tests in which the command, the agent and torchrun are not what is tried.

        Starting those, and importing torch in each process, takes ten times as long as what a tiny run does.
        """
        failures = self._ranks_failures()
        assert not failures, failures

    def failure_in_forks(self) -> Failure:
        """Why such ranks fail: what the first of them left for the agent."""
        return self._ranks_failures()[0]

    def told_of_data(self) -> str:
        """What the command prints of the files that such ranks found and left out."""
        progress = read_progress(Scratch(self.scratch).progress)
        assert progress is not None
        assert progress.funnel is not None
        return "\n".join(funnel_lines(progress.funnel))

    def _ranks_failures(self) -> list[Failure]:
        run_file = self.resolved()
        path = Path(run_file.scratch) / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        run_file.write(path)
        try:
            run_ranks(run_file.plan.processes_per_node, "launched_rank:train", str(path))
        except AssertionError:
            failures = read_failures(Scratch(Path(run_file.scratch)).failures(run_file.attempt))
            if not failures:
                raise
            return list(failures)
        return []


def write_run(path: Path, document: dict[str, Any]) -> LocalRun:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return LocalRun(path, document)


def tiny_run(folder: Path, family: str = "sd3", *, pictures: int = 8, name: str = "tiny", **spec: Any) -> LocalRun:
    """A run of a tiny checkpoint on real digits, fp32 on the CPU with two processes; `spec` is laid over the defaults."""
    if not (folder / "base" / "model_index.json").exists():
        save_tiny(family, folder / "base")
    if not (folder / "pictures").exists():
        write_digits(folder / "pictures", pictures)
    base: dict[str, Any] = {
        "apiVersion": "atelier.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": {
            "model": {"family": family, "source": "base"},
            "adapter": {"type": "lora", "rank": 4, "alpha": 8},
            "data": {"sources": [{"uri": "pictures"}], "resolution": 32, "maxUpscale": "2"},
            "hyperparameters": {"steps": 6, "globalBatchSize": 4, "learningRate": "1e-3", "precision": "fp32"},
            "parallelism": {"gpusPerNode": 0, "processesPerNode": 2},
            "storage": {"checkpoint": {"everySteps": 2, "everySeconds": 0}},
        },
    }
    if "type" in spec.get("adapter", {}):
        base["spec"]["adapter"] = {}  # another kind of adapter takes nothing over
    if "audio" in spec.get("data", {}):
        base["spec"]["data"] = {}  # sounds have no pixels
    return write_run(folder / "run.yaml", merged(base, {"spec": spec}))


def demo_run(made: Path, folder: Path) -> LocalRun:
    """A run of ten steps in `folder`, of the checkpoint and the pictures in `made`."""
    for name in ("base", "pictures"):
        (folder / name).symlink_to(made / name)
    return tiny_run(folder, name="demo", hyperparameters={"steps": 10})


def kill_tree(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process and everything below it, at once: a machine that loses power."""
    parent = psutil.Process(process.pid)
    victims = [*parent.children(recursive=True), parent]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.suspend()  # nobody gets to see another one die
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=30)
    process.communicate()


def wait_for(
    run: LocalRun, condition: Callable[[Progress], bool], process: "subprocess.Popen[str]", seconds: float = 300
) -> Progress:
    """Poll the run's progress until `condition`; fails with the output when the process ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        progress = read_progress(Scratch(run.scratch).progress)
        if progress is not None and condition(progress):
            return progress
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode}:\n{process.communicate()[0][-6000:]}")
        time.sleep(0.02)
    kill_tree(process)
    raise AssertionError(f"not reached in {seconds} s; last progress: {progress}")


def history(run: LocalRun) -> dict[int, float]:
    """Loss by step, as the run kept it."""
    lines = (run.folder / "logs" / "history.jsonl").read_text().splitlines()[1:]
    return {int(row[0]): float(row[1]) for row in map(json.loads, lines)}


def checkpoint_state(run: LocalRun, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint of a step, by its path in the saved state."""
    manifest = sorted((run.folder / "manifests").glob(f"{step:08d}-*.json"))[-1]
    folder = sorted((run.folder / "checkpoints").glob(f"{manifest.stem}-*"))[-1]
    flat: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = torch.as_tensor(value)

    collect("", _load_state_dict_from_keys(checkpoint_id=folder))
    return flat
