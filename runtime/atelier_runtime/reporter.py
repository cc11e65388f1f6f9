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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from atelier_api.progress import ArtifactReport, FunnelReport, Stage
from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint import Checkpointer, ResumePoint
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import EtaEstimator, ProgressWriter
from atelier_runtime.step_agreement import StepFacts
from atelier_runtime.store import Store

log = logging.getLogger(__name__)

HISTORY_KEY = "logs/history.jsonl"
LOSS_WINDOW = 20


@dataclass
class History:
    """Facts of the whole run: [step, loss, gradient norm, learning rate] rows, seconds by phase, samples by step, events.

    `techniques` has rows of (step, loss) of each technique.
    """

    rows: list[tuple[int, float, float, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    techniques: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        head = {"seconds": self.seconds, "samples": self.samples, "events": self.events, "techniques": self.techniques}
        lines: list[Any] = [head, *self.rows]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, before_step: int) -> "History":
        """The history as far as a resume at `before_step` keeps it: steps that will be trained again are dropped."""
        head, *rows = (json.loads(line) for line in data.decode().splitlines())
        samples = {int(step): keys for step, keys in head["samples"].items() if int(step) <= before_step}
        kept = [(int(r[0]), float(r[1]), float(r[2]), float(r[3])) for r in rows if r[0] < before_step]
        techniques = {
            name: [(int(step), float(loss)) for step, loss in column if step < before_step]
            for name, column in head.get("techniques", {}).items()  # written before there were techniques, it has none
        }
        return cls(kept, head["seconds"], samples, head["events"], techniques)


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
        self._unshown: StepFacts | None = None
        """The newest confirmed step, while the progress has not been told of it."""
        self.learning_rate = 0.0
        self.history = History()
        self._phases = PhaseClock(self.history.seconds)

    def stage(self, stage: Stage, detail: str = "", *, done: int = 0, total: int = 0) -> None:
        """Say which stage the run is in."""
        self._show_step()
        self._progress.update(stage=stage, detail=detail, done=done, total=total)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Context whose seconds are added to the report's time per phase."""
        return self._phases.phase(phase)

    def funnel(self, funnel: FunnelReport) -> None:
        """Show what became of the files found."""
        self._progress.update(funnel=funnel)

    def published(self, artifacts: list[ArtifactReport]) -> None:
        """Show the published files."""
        self._progress.update(artifacts=artifacts)

    def training(self, step: int) -> None:
        """The loop starts, or goes on, at `step`."""
        total = self._spec.hyperparameters.steps
        self._show_step()
        self._progress.update(stage="Training", detail="", step=step, total_steps=total, done=step, total=total)

    def step_finished(self, step: int, seconds: float, *, pixels: float, data_wait_seconds: float) -> None:
        """Timing of a step, as this rank's CPU saw it. `step` counts the steps done, `pixels` is of the global batch."""
        if self._warm:
            self._eta.step_took(seconds)
        self._warm = True
        self.metrics.step_finished(step, samples=self._spec.hyperparameters.global_batch_size, pixels=pixels)
        self.metrics.data_waited(data_wait_seconds)

    def step_confirmed(self, facts: StepFacts, techniques: Mapping[str, float]) -> None:
        """Numbers of a step over all ranks; of techniques the losses by name."""
        self.metrics.numbers(
            loss=facts.loss,
            gradient_norm=facts.gradient_norm,
            learning_rate=self.learning_rate,
            techniques=techniques,
        )
        self._losses.append(facts.loss)
        for name, loss in techniques.items():
            self.history.techniques.setdefault(name, []).append((facts.step, loss))
        self.history.rows.append((facts.step, facts.loss, facts.gradient_norm, self.learning_rate))
        self._unshown = facts
        if self._progress.is_due:
            self._show_step()

    def _show_step(self) -> None:
        """Tell the progress of the newest step. Not at every step, and before all else, so that the newest word is the last."""
        facts, self._unshown = self._unshown, None
        if facts is None:
            return
        hyperparameters = self._spec.hyperparameters
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
                self.metrics.checkpoint_failed(outcome.stage, outcome.error or RuntimeError("unknown"))
                log.warning("checkpoint failed", extra={"step": outcome.step, "reason": str(outcome.error)})
                self.history.events.append(f"step {outcome.step}: checkpoint failed: {outcome.error}")
                continue
            self.metrics.checkpoint_finished(
                outcome.step,
                size_bytes=outcome.report.size_bytes,
                save_seconds=outcome.save_seconds,
                upload_seconds=outcome.upload_seconds,
            )
            self._show_step()
            self._progress.update(checkpoint=outcome.report)
            self._progress.flush()

    def keep_history(self) -> None:
        """Write the history to the store, so that the loss curve goes on after a restart. Rank 0 only."""
        self._store.put_bytes(HISTORY_KEY, self.history.to_bytes())

    def samples_drawn(self, step: int, keys: list[str]) -> None:
        """Keys of a round of samples."""
        self.history.samples[step] = keys
        self._show_step()
        self._progress.update(samples=keys)

    def resumed(self, point: ResumePoint, seconds: float) -> None:
        """Training goes on from a checkpoint, which took `seconds` to load: take over the history up to it."""
        try:
            earlier = History.from_bytes(self._store.get_bytes(HISTORY_KEY), before_step=point.step)
        except (FileNotFoundError, ValueError):
            log.warning("history unreadable; the curve starts at the resumed step", extra={"step": point.step})
        else:
            for phase, spent in self.history.seconds.items():
                earlier.seconds[phase] = earlier.seconds.get(phase, 0.0) + spent
            self.history = earlier
            self._phases.seconds = earlier.seconds
        for refusal in point.refused:
            self.metrics.checkpoint_verify_failed()
            self.history.events.append(f"checkpoint {refusal.manifest} was refused: {refusal.reason}")
        self.metrics.checkpoint_restored(point.step, seconds)
        self.history.events.append(f"resumed at step {point.step}")


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the device, or resident on the host where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PhaseClock:
    """Seconds by phase. A phase inside another stops the outer one's clock, so that the seconds add up to the time that passed."""

    def __init__(self, seconds: dict[str, float], clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = seconds
        self._clock = clock
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def _credit(self) -> None:
        now = self._clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
