"""A run for the benchmarks: the demo's base model with a LoRA of rank 8 on real digits, fp32, one process, one thread."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atelier_api.run_file import ExecutionPlan, RunFile, RunIdentity
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_runtime.checkpoint import Checkpointer
from atelier_runtime.data import build_dataset
from atelier_runtime.denoisers import Denoisers
from atelier_runtime.families import get_family
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import ProgressWriter
from atelier_runtime.reporter import Reporter
from atelier_runtime.store import open_store
from atelier_runtime.trainer import Parts, build_run_objective, build_state, staging_folder
from runs import write_digits
from sessions import alone
from tiny_data import no_report

BASE_MODEL = Path(__file__).parents[2] / "examples" / "demo" / "base"
LEARNING_RATE = 1e-4
PICTURES = 64


class LoopClock:
    """The clock of what the loop does every so often: the loop's own CPU time, which stands still while others have their turn.

    On an idle machine that is wall time; on a busy one, nothing comes more often per step because steps take longer. With
    `step_seconds` it goes by steps instead of time, so that what is counted does not depend on the machine at all.
    """

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self._paused_at: float | None = None
        self._offset = 0.0
        self._stepped = 0.0

    def __call__(self) -> float:
        if self.step_seconds is not None:
            return self._stepped
        return (time.thread_time() if self._paused_at is None else self._paused_at) - self._offset

    def pause(self) -> None:
        self._paused_at = time.thread_time()

    def go_on(self) -> None:
        assert self._paused_at is not None
        self._offset += time.thread_time() - self._paused_at
        self._paused_at = None

    def go_by_steps(self, step_seconds: float) -> None:
        self._stepped = self()
        self.step_seconds = step_seconds

    def step(self) -> None:
        self._stepped += self.step_seconds or 0.0


class WatchedReporter(Reporter):
    """The reporter, which also keeps what the loader said last and the losses."""

    data_wait_seconds = 0.0

    def step_finished(self, step: int, seconds: float, *, pixels: float, data_wait_seconds: float) -> None:
        self.data_wait_seconds = data_wait_seconds
        super().step_finished(step, seconds, pixels=pixels, data_wait_seconds=data_wait_seconds)


@dataclass(frozen=True)
class BenchRun:
    """The parts of a run, and its clock."""

    parts: Parts
    reporter: WatchedReporter
    clock: LoopClock

    @property
    def losses(self) -> list[float]:
        """By step, from 0 on."""
        return [loss for _, loss, _, _ in self.reporter.history.rows]


def plan(batch_size: int) -> ExecutionPlan:
    """One process on the CPU, one thread."""
    return ExecutionPlan(
        strategy="single",
        device="cpu",
        nodes=1,
        processes_per_node=1,
        micro_batch_size=batch_size,
        gradient_accumulation=1,
        gradient_checkpointing=False,
        learning_rate=LEARNING_RATE,
        threads_per_process=1,
        predicted_peak_memory_bytes=0,
    )


def bench_run_file(folder: Path, *, batch_size: int = 1, steps: int = 1) -> RunFile:
    """The resolved run. It saves at its end only."""
    document: dict[str, Any] = {
        "model": {"family": "sd3", "source": str(BASE_MODEL)},
        "adapter": {"type": "lora", "rank": 8, "alpha": 8, "targets": ["attention"]},
        "data": {"sources": [{"uri": str(folder / "pictures")}], "resolution": 32},
        "hyperparameters": {"steps": steps, "globalBatchSize": batch_size, "precision": "fp32"},
        "parallelism": {"gpusPerNode": 0},
        "storage": {"uri": str(folder / "runs"), "checkpoint": {"everySteps": 0, "everySeconds": 604_800}},
    }
    return RunFile(
        identity=RunIdentity(namespace="default", name="bench", uid="local"),
        spec=TrainingRunSpec.model_validate(document),
        plan=plan(batch_size),
        model_folder=str(BASE_MODEL),
        scratch=str(folder / "scratch"),
        cache_uri=str(folder / "cache"),
    )


def bench_run(folder: Path, *, batch_size: int, steps: int) -> BenchRun:
    """The parts as `launch.prepare` makes them. The caller closes the checkpointer."""
    write_digits(folder / "pictures", PICTURES)
    run_file = bench_run_file(folder, batch_size=batch_size, steps=steps)
    distributed, writer = alone(plan(1), folder)
    family, clock = get_family("sd3"), LoopClock()
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    metrics = TrainMetrics(0, clock=clock)
    progress = ProgressWriter(folder / "progress.json", clock=clock)
    reporter = WatchedReporter(run_file, store, progress, metrics)
    dataset = build_dataset(run_file, family, distributed, no_report)
    denoisers = Denoisers.load(run_file, family, distributed)
    objective = build_run_objective(run_file, family)
    state = build_state(denoisers, run_file.spec.hyperparameters, run_file.plan, distributed)
    checkpointer = Checkpointer(
        run_file, distributed, store, staging_folder(run_file), writer=writer, dataset_hash=dataset.hash
    )
    parts = Parts(run_file, family, distributed, denoisers, objective, dataset, state, checkpointer, metrics, reporter)
    return BenchRun(parts, reporter, clock)
