"""Every metric a run exports: one row each, read by the code that counts, by the tests and by the reference page.

Names carry the prefix `atelier_`. Rows with the label `rank` come from every rank, all others from rank 0 only. `namespace` and
`run` are in no row: on a cluster the scrape target's relabelling adds them, on one machine the agent does.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "atelier_"

# Changing a bucket breaks the history of every dashboard: a test freezes them.
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
STORAGE_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

PHASES = ("data", "forward", "backward", "optimizer", "sync")
GOODPUT_STATES = ("productive", "startup", "checkpoint", "recovery", "stalled", "sampling")


@dataclass(frozen=True)
class MetricFacts:
    """One row. `name` is without the prefix; a counter's ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, *labels: str) -> MetricFacts:
    return MetricFacts(name, "counter", help, labels)


def _gauge(name: str, help: str, *labels: str) -> MetricFacts:
    return MetricFacts(name, "gauge", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> MetricFacts:
    return MetricFacts(name, "histogram", help, labels, buckets)


METRICS: dict[str, MetricFacts] = {
    facts.name: facts
    for facts in (
        _gauge("train_step", "Optimizer steps done."),
        _counter("train_steps_total", "Optimizer steps done by this process group, repeated ones included."),
        _counter("train_samples_total", "Samples trained on."),
        _counter("train_pixels_total", "Pixels trained on, all frames of a clip included."),
        _gauge("train_last_step_timestamp_seconds", "Unix time at which the newest step ended."),
        _gauge("train_loss", "Loss of the objective in the newest step, mean over the global batch."),
        _gauge("train_technique_loss", "Loss of a technique in the newest step, beside train_loss.", "technique"),
        _gauge("train_grad_norm", "Norm of the gradient of the newest step before clipping."),
        _gauge("train_learning_rate", "Learning rate of the newest step.", "param_group"),
        _histogram("train_step_duration_seconds", "Time of one step spent in a phase.", STEP_SECONDS, "phase"),
        _counter("train_nonfinite_total", "Steps whose loss or gradient was not finite."),
        _counter("train_goodput_seconds_total", "Time by what it was spent on; every second counts once.", "state"),
        _counter("dataloader_wait_seconds_total", "Time the trainer waited for data.", "rank"),
        _gauge("gpu_memory_allocated_bytes", "Peak of memory held by tensors since the last report.", "rank"),
        _gauge("gpu_memory_reserved_bytes", "Peak of memory held by the allocator since the last report.", "rank"),
        _counter(
            "gpu_alloc_retries_total", "Allocations that only succeeded after the allocator's cache was freed.", "rank"
        ),
        _counter("gpu_ooms_total", "Allocations that failed.", "rank"),
        _histogram("checkpoint_save_stall_seconds", "Time the trainer stood still for a checkpoint.", STORAGE_SECONDS),
        _histogram(
            "checkpoint_save_seconds", "Time from the start of a save to its files on the local disk.", STORAGE_SECONDS
        ),
        _histogram(
            "checkpoint_upload_seconds",
            "Time from the files on the local disk to the committed manifest.",
            STORAGE_SECONDS,
        ),
        _histogram("checkpoint_restore_seconds", "Time to find, verify and load a checkpoint.", STORAGE_SECONDS),
        _histogram(
            "checkpoint_preemption_commit_seconds",
            "Time from the request to stop to the manifest.",
            STORAGE_SECONDS,
        ),
        _gauge("checkpoint_bytes", "Size of the newest committed checkpoint."),
        _counter("checkpoint_upload_bytes_total", "Bytes of committed checkpoints."),
        _counter("checkpoint_failures_total", "Checkpoints that were not committed.", "stage", "reason"),
        _counter(
            "checkpoint_verify_failures_total", "Checkpoints refused on resume because a hash or a file did not match."
        ),
        _gauge("checkpoint_last_success_timestamp_seconds", "Unix time of the newest committed checkpoint."),
        _gauge("checkpoint_last_success_step", "Step of the newest committed checkpoint."),
        _gauge("checkpoint_lag_steps", "Steps done since the newest committed checkpoint."),
        _gauge(
            "checkpoint_interval_seconds",
            "Expected time between checkpoints, configured or steps times the median step.",
        ),
        _counter("storage_requests_total", "Requests to the store.", "operation", "code"),
        _histogram(
            "storage_request_duration_seconds",
            "Time of one request to the store with its retries.",
            STORAGE_SECONDS,
            "operation",
        ),
        _counter("storage_retries_total", "Requests to the store that were tried again.", "reason"),
        _gauge("staging_free_bytes", "Free space on the disk that checkpoints are staged on."),
    )
}
"""The table by name."""
