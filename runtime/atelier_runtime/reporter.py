"""What a rank tells about itself: progress, metrics, the log, and the history that the report is drawn from.

Only rank 0 speaks; the other ranks feed metrics. The history goes to the store with each checkpoint, so that the loss curve stays
continuous over restarts.
"""

import json
import logging
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from atelier_api.progress import FunnelReport, Stage
from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint import Checkpointer
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import EtaEstimator, ProgressWriter
from atelier_runtime.step_agreement import StepFacts
from atelier_runtime.store import Store

log = logging.getLogger(__name__)

HISTORY_KEY = "logs/history.jsonl"
LOSS_WINDOW = 20


@dataclass
class History:
    """Facts of the whole run: [step, loss, gradient norm, learning rate] rows, seconds by phase, samples by step, events."""

    rows: list[tuple[int, float, float, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        lines: list[Any] = [{"seconds": self.seconds, "samples": self.samples, "events": self.events}, *self.rows]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, before_step: int) -> "History":
        """The history as far as a resume at `before_step` keeps it: steps that will be trained again are dropped."""
        head, *rows = (json.loads(line) for line in data.decode().splitlines())
        samples = {int(step): keys for step, keys in head["samples"].items() if int(step) <= before_step}
        kept = [(int(r[0]), float(r[1]), float(r[2]), float(r[3])) for r in rows if r[0] < before_step]
        return cls(kept, head["seconds"], samples, head["events"])


class Reporter:
    """Progress, metrics and history of one rank. Where `progress` writes nowhere (ranks other than 0), only metrics are fed."""

    def __init__(self, run_file: RunFile, store: Store, progress: ProgressWriter, metrics: TrainMetrics) -> None:
        self._spec = run_file.spec
        self._store = store
        self._progress = progress
        self.metrics = metrics
        self._eta = EtaEstimator(self._spec.hyperparameters.steps)
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._warm = False
        self.learning_rate = 0.0
        self.history = History()

    def stage(self, stage: Stage, detail: str = "", *, done: int = 0, total: int = 0) -> None:
        """Say which stage the run is in."""
        self._progress.update(stage=stage, detail=detail, done=done, total=total)

    def timed(self, phase: str) -> "_Timed":
        """Context whose seconds are added to the report's time per phase."""
        return _Timed(self.history.seconds, phase)

    def funnel(self, funnel: FunnelReport) -> None:
        """Show what became of the files found."""
        self._progress.update(funnel=funnel)

    def training(self, step: int) -> None:
        """The loop starts, or goes on, at `step`."""
        total = self._spec.hyperparameters.steps
        self._progress.update(stage="Training", detail="", step=step, total_steps=total, done=step, total=total)

    def step_finished(self, step: int, seconds: float, *, pixels: float, data_wait_seconds: float) -> None:
        """Timing of a step, as this rank's CPU saw it. `step` counts the steps done, `pixels` is of the global batch."""
        if self._warm:
            self._eta.step_took(seconds)
        self._warm = True
        self.metrics.step_finished(step, samples=self._spec.hyperparameters.global_batch_size, pixels=pixels)
        self.metrics.data_waited(data_wait_seconds)

    def step_confirmed(self, facts: StepFacts) -> None:
        """Numbers of a step over all ranks."""
        hyperparameters = self._spec.hyperparameters
        self.metrics.numbers(loss=facts.loss, gradient_norm=facts.gradient_norm, learning_rate=self.learning_rate)
        self._losses.append(facts.loss)
        self.history.rows.append((facts.step, facts.loss, facts.gradient_norm, self.learning_rate))
        done = facts.step + 1
        self._progress.update(
            step=done,
            done=done,
            total=hyperparameters.steps,
            loss=statistics.fmean(self._losses),
            learning_rate=self.learning_rate,
            samples_per_second=self._eta.samples_per_second(hyperparameters.global_batch_size),
            eta_seconds=self._eta.eta_seconds(done),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def poll(self, checkpointer: Checkpointer) -> None:
        """Tell of saves that have ended since the last call."""
        for outcome in checkpointer.poll():
            if outcome.report is None:
                self.metrics.checkpoint_failed(outcome.stage, outcome.error)
                log.warning("checkpoint failed", extra={"step": outcome.step, "reason": str(outcome.error)})
                self.history.events.append(f"step {outcome.step}: checkpoint failed: {outcome.error}")
                continue
            self.metrics.checkpoint_finished(
                outcome.step,
                size_bytes=outcome.report.size_bytes,
                save_seconds=outcome.save_seconds,
                upload_seconds=outcome.upload_seconds,
            )
            self._progress.update(checkpoint=outcome.report)
            self._progress.flush()

    def keep_history(self) -> None:
        """Write the history to the store, so that the loss curve goes on after a restart. Rank 0 only."""
        self._store.put_bytes(HISTORY_KEY, self.history.to_bytes())

    def samples_drawn(self, step: int, keys: list[str]) -> None:
        """Keys of a round of samples."""
        self.history.samples[step] = keys
        self._progress.update(samples=keys)

    def resumed(self, step: int) -> None:
        """Take over the history of the attempts before, up to `step`."""
        try:
            self.history = History.from_bytes(self._store.get_bytes(HISTORY_KEY), before_step=step)
        except (KeyError, FileNotFoundError, ValueError):
            log.warning("history unreadable; the curve starts at the resumed step", extra={"step": step})
        self.history.events.append(f"resumed at step {step}")


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the device, or resident on the host where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Timed:
    def __init__(self, seconds: dict[str, float], phase: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._phase, self._clock = seconds, phase, clock

    def __enter__(self) -> None:
        self._started = self._clock()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + self._clock() - self._started
