"""What a rank counts while it trains. The numbers lie in memory-mapped files of prometheus_client, which the node's agent reads.

A rank never waits for a scrape: counting is a write to its own file, and only the agent serves HTTP. The files are used when
`PROMETHEUS_MULTIPROC_DIR` is set before this module is imported (the agent sets it for its ranks); without it the numbers stay
in the given registry.
"""

import atexit
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from atelier_runtime.observe.failure import reason_of
from atelier_runtime.observe.metric_table import METRICS, PHASES, PREFIX

# Handed over by the agent to its ranks: when the attempt began, and the step that an earlier, failed attempt had reached.
STARTED_AT = "ATELIER_STARTED_AT"
RECOVER_UNTIL = "ATELIER_RECOVER_UNTIL_STEP"

# Numbers of a step reach the agent this late at most while steps are shorter than this.
FLUSH_SECONDS = 0.25

# A step that takes longer than this is time lost, not time trained.
STALL_SECONDS = 300.0

# Room for a few hundred series of one kind.
_FILE_BYTES = 1 << 17

Metric: TypeAlias = Counter | Gauge | Histogram

disable_created_metrics()  # type: ignore[no-untyped-call]  # its `_created` gauges would double the series of every counter


class MetricSet:
    """The metrics of the table, each made at its first use: a gauge not known yet is absent from the scrape, not 0."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._families: dict[str, Metric] = {}
        self._children: dict[tuple[str, ...], Metric] = {}
        self._added: dict[tuple[str, ...], float] = {}
        self._set: dict[tuple[str, ...], float] = {}

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Raise a counter."""
        child = self._children.get((name, *labels)) or self._child(name, labels)
        child.inc(amount)  # type: ignore[union-attr]

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        child = self._children.get((name, *labels)) or self._child(name, labels)
        child.set(value)  # type: ignore[union-attr]

    def add_later(self, name: str, amount: float, *labels: str) -> None:
        """Raise a counter at the next flush; a tenth of the cost of `add`."""
        key = (name, *labels)
        self._added[key] = self._added.get(key, 0.0) + amount

    def set_later(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge at the next flush."""
        self._set[name, *labels] = value

    def flush(self) -> None:
        """Write what was put off."""
        for (name, *labels), amount in self._added.items():
            self.add(name, amount, *labels)
        for (name, *labels), value in self._set.items():
            self.set(name, value, *labels)
        self._added.clear()
        self._set.clear()

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        child = self._children.get((name, *labels)) or self._child(name, labels)
        child.observe(value)  # type: ignore[union-attr]

    def _child(self, name: str, labels: tuple[str, ...]) -> Metric:
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = self._family(name)
        child = family.labels(*labels) if labels else family
        self._children[(name, *labels)] = child
        return child

    def _family(self, name: str) -> Metric:
        facts = METRICS[name]
        full_name = PREFIX + facts.name
        match facts.kind:
            case "counter":
                return Counter(full_name, facts.help, facts.labels, registry=self.registry)
            case "gauge":
                # Of a rank and its successor after a restart, the newest value is the true one.
                return Gauge(
                    full_name, facts.help, facts.labels, registry=self.registry, multiprocess_mode="mostrecent"
                )
            case "histogram":
                return Histogram(full_name, facts.help, facts.labels, registry=self.registry, buckets=facts.buckets)


def reserve_files(folder: Path) -> None:
    """Take the disk space of this process's files of numbers, before prometheus_client maps them.

    It makes them sparse: on a disk that fills up later, a write into a hole of the map would kill the process with SIGBUS.
    Raises OSError when the disk is full already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("counter", "histogram", "gauge_mostrecent"):
        with open(folder / f"{kind}_{os.getpid()}.db", "ab") as file:
            os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)


class _Span:
    """A reusable `with` block that hands the seconds spent inside it to `done`. Not for nesting in itself."""

    __slots__ = ("_clock", "_done", "_started")

    def __init__(self, clock: Callable[[], float], done: Callable[[float], None]) -> None:
        self._clock = clock
        self._done = done
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done(self._clock() - self._started)


class _Goodput:
    """A ledger of time: every second since the start of the attempt belongs to exactly one state (rank 0 only)."""

    def __init__(self, metrics: MetricSet, clock: Callable[[], float], age_seconds: float) -> None:
        self._metrics = metrics
        self._clock = clock
        self._since = clock() - age_seconds

    @property
    def open_seconds(self) -> float:
        """Time since the last entry."""
        return self._clock() - self._since

    def spent(self, state: str) -> None:
        """The time since the last entry was spent on `state`."""
        now = self._clock()
        self._metrics.add_later("train_goodput_seconds_total", max(0.0, now - self._since), state)
        self._since = now


class TrainMetrics:
    """The metrics of one rank. Every method is cheap (some 15 µs per step in all) and none waits for anything.

    `age_seconds`: how long ago the attempt began, counted as start-up. `recover_until`: the step that an earlier, failed attempt
    had reached; steps up to it are repeated work. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        rank: int,
        *,
        age_seconds: float = 0.0,
        recover_until: int = 0,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._metrics = MetricSet(registry)
        self._rank = str(rank)
        self._main = rank == 0
        self._clock = clock
        self._recover_until = recover_until
        self._goodput = _Goodput(self._metrics, clock, age_seconds)
        self._trained = False
        self._step = 0
        self._flushed_at = -math.inf
        self._phase_seconds = dict.fromkeys(PHASES, 0.0)
        self._phases = {phase: _Span(clock, self._phase_adder(phase)) for phase in PHASES}
        self._totals: dict[str, float] = {}
        self._last_checkpoint_step: int | None = None
        if self._main:
            self._start_counters()

    @classmethod
    def from_environment(cls, rank: int, environment: Mapping[str, str]) -> "TrainMetrics":
        """With what the agent handed over; alone, without an agent, the attempt begins now."""
        started_at = float(environment.get(STARTED_AT, time.time()))
        recover_until = int(environment.get(RECOVER_UNTIL, 0))
        if folder := environment.get("PROMETHEUS_MULTIPROC_DIR"):
            reserve_files(Path(folder))
        metrics = cls(rank, age_seconds=max(0.0, time.time() - started_at), recover_until=recover_until)
        atexit.register(metrics._metrics.flush)
        return metrics

    @property
    def registry(self) -> CollectorRegistry:
        """Where the numbers are when no agent collects them."""
        self._metrics.flush()
        return self._metrics.registry

    # The loop

    def phase(self, name: str) -> _Span:
        """A `with` block around one phase of the step, one of `metric_table.PHASES`; entries of one step add up."""
        return self._phases[name]

    def step_finished(self, step: int, *, samples: float, pixels: float) -> None:
        """A step has ended; `step` counts the steps done, `samples` and `pixels` are of the global batch."""
        metrics, seconds = self._metrics, self._phase_seconds
        if self._main:
            for phase, spent in seconds.items():
                if spent > 0:
                    metrics.observe("train_step_duration_seconds", spent, phase)
            metrics.set_later("train_step", step)
            metrics.add_later("train_steps_total", 1)
            metrics.add_later("train_samples_total", samples)
            metrics.add_later("train_pixels_total", pixels)
            metrics.set_later("train_last_step_timestamp_seconds", time.time())
            if self._last_checkpoint_step is not None:
                metrics.set_later("checkpoint_lag_steps", max(0, step - self._last_checkpoint_step))
            self._goodput.spent(self._state_of(step))
        self._trained, self._step = True, step
        for phase in seconds:
            seconds[phase] = 0.0
        now = self._clock()
        if now - self._flushed_at >= FLUSH_SECONDS:
            metrics.flush()
            self._flushed_at = now

    def numbers(
        self,
        *,
        loss: float,
        gradient_norm: float | None,
        learning_rate: float,
        techniques: Mapping[str, float] | None = None,
    ) -> None:
        """The numbers of the newest step that is known; they may lag behind `step_finished`, so that no rank waits for its device.

        `techniques` are the losses beside the objective's, by name.
        """
        if self._main:
            for name, value in (techniques or {}).items():
                self._metrics.set_later("train_technique_loss", value, name)
            self._metrics.set_later("train_loss", loss)
            self._metrics.set_later("train_learning_rate", learning_rate, "0")
            if gradient_norm is not None:
                self._metrics.set_later("train_grad_norm", gradient_norm)

    def nonfinite(self) -> None:
        """A step had a loss or a gradient that is not finite."""
        if self._main:
            self._metrics.add("train_nonfinite_total", 1)

    def data_waited(self, total_seconds: float) -> None:
        """How long this rank's trainer has waited for data, in all since its start."""
        self._raise_to("dataloader_wait_seconds_total", total_seconds)

    def memory(self, *, allocated_bytes: int, reserved_bytes: int, alloc_retries: int = 0, ooms: int = 0) -> None:
        """Device memory of this rank: peaks since the last call; retries and ooms in all since its start. Only with a GPU."""
        self._metrics.set("gpu_memory_allocated_bytes", allocated_bytes, self._rank)
        self._metrics.set("gpu_memory_reserved_bytes", reserved_bytes, self._rank)
        self._raise_to("gpu_alloc_retries_total", alloc_retries)
        self._raise_to("gpu_ooms_total", ooms)

    def sampling(self) -> _Span:
        """A `with` block around drawing samples."""
        return self._pause("sampling")

    # Checkpoints

    def checkpoint_stall(self) -> _Span:
        """A `with` block around the part of a save that the trainer waits for."""
        return self._pause("checkpoint")

    def checkpoint_finished(self, step: int, *, size_bytes: int, save_seconds: float, upload_seconds: float) -> None:
        """A checkpoint is committed: its manifest is in the store."""
        if not self._main:
            return
        metrics = self._metrics
        metrics.observe("checkpoint_save_seconds", save_seconds)
        metrics.observe("checkpoint_upload_seconds", upload_seconds)
        metrics.set("checkpoint_bytes", size_bytes)
        metrics.add("checkpoint_upload_bytes_total", size_bytes)
        metrics.set("checkpoint_last_success_timestamp_seconds", time.time())
        self._checkpoint_at(step)

    def checkpoint_failed(self, stage: str, error: BaseException) -> None:
        """A checkpoint was given up at `stage` (save or upload)."""
        if self._main:
            self._metrics.add("checkpoint_failures_total", 1, stage, reason_of(error))

    def checkpoint_verify_failed(self) -> None:
        """A checkpoint did not verify on resume."""
        if self._main:
            self._metrics.add("checkpoint_verify_failures_total", 1)

    def checkpoint_restored(self, step: int, seconds: float) -> None:
        """Training goes on from the checkpoint of `step`, which took `seconds` to load."""
        if self._main:
            self._metrics.observe("checkpoint_restore_seconds", seconds)
            self._checkpoint_at(step)

    def checkpoint_interval(self, seconds: float) -> None:
        """The time that is expected between checkpoints; the alert on stale ones compares with it."""
        if self._main:
            self._metrics.set("checkpoint_interval_seconds", seconds)

    def preemption_committed(self, seconds: float) -> None:
        """The last checkpoint before leaving was committed `seconds` after the request to stop."""
        if self._main:
            self._metrics.observe("checkpoint_preemption_commit_seconds", seconds)

    # The store calls these through its hook

    def storage_request(self, operation: str, code: str, seconds: float) -> None:
        """One request to the store, with all its retries. `code` is the HTTP status or the store's error code."""
        if self._main:
            self._metrics.add("storage_requests_total", 1, operation, code)
            self._metrics.observe("storage_request_duration_seconds", seconds, operation)

    def storage_retry(self, reason: str) -> None:
        """A request was tried again."""
        if self._main:
            self._metrics.add("storage_retries_total", 1, reason)

    def _start_counters(self) -> None:
        """Rare events begin at 0: Prometheus sees no increase in a counter whose first value is 1."""
        for name in ("train_nonfinite_total", "checkpoint_verify_failures_total"):
            self._metrics.add(name, 0)
        for stage in ("save", "upload"):
            for reason in ("StoreUnreachable", "CredentialsRejected", "DiskFull", "BackendError"):
                self._metrics.add("checkpoint_failures_total", 0, stage, reason)

    def _phase_adder(self, phase: str) -> Callable[[float], None]:
        def add(seconds: float) -> None:
            self._phase_seconds[phase] += seconds

        return add

    def _pause(self, state: str) -> _Span:
        """What came before the block is closed as training or start-up, the block itself as `state`."""

        def done(seconds: float) -> None:
            if self._main:
                self._goodput.spent(state)
                if state == "checkpoint":
                    self._metrics.observe("checkpoint_save_stall_seconds", seconds)
            self._metrics.flush()

        if self._main:
            self._goodput.spent(self._state_of(self._step))
        return _Span(self._clock, done)

    def _state_of(self, step: int) -> str:
        """What the time up to the end of `step` was spent on."""
        if not self._trained:
            return "recovery" if self._recover_until > 0 else "startup"
        if self._goodput.open_seconds > STALL_SECONDS:
            return "stalled"
        return "recovery" if step <= self._recover_until else "productive"

    def _raise_to(self, name: str, total: float) -> None:
        """Raise this rank's counter to `total`, which only grows."""
        before = self._totals.get(name, 0.0)
        if total > before or name not in self._totals:
            self._metrics.add_later(name, max(0.0, total - before), self._rank)
            self._totals[name] = max(before, total)

    def _checkpoint_at(self, step: int) -> None:
        self._last_checkpoint_step = step
        self._metrics.set("checkpoint_last_success_step", step)
        self._metrics.set_later("checkpoint_lag_steps", max(0, self._step - step))
        self._metrics.flush()
