"""`status` of a run: what the operator has found out. Written by it alone."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal
from atelier_api.v1alpha1.conditions import Condition

Phase = Literal[
    "Pending", "Queued", "Preparing", "Running", "Suspended", "Recovering", "Publishing", "Succeeded", "Failed"
]

MOST_ATTEMPTS = 20
MOST_CONDITIONS = 16
MOST_SAMPLES = 64
MOST_ARTIFACTS = 32
MOST_NODES_EXCLUDED = 32


class PlanStatus(Block):
    """How the run is executed."""

    backend: Literal["jobset", "job"] = Field(description="Kind of the child: a JobSet, or an Indexed Job.")
    gang: Literal["kueue", "none"] = Field(description="Who sees to it that all nodes start together.")
    strategy: str = Field(max_length=63, description="Strategy.")
    world_size: int = Field(ge=1, description="Processes.")
    micro_batch_size: int = Field(ge=1, description="Samples of one forward pass of one process.")
    gradient_accumulation: int = Field(ge=1, description="Passes of one step.")
    gradient_checkpointing: bool = Field(description="Whether activations are recomputed.")
    tiled_encoding: bool = Field(default=False, description="Whether latents are made of tiles.")
    tiled_samples: bool = Field(default=False, description="Whether samples are drawn in tiles.")
    predicted_peak_memory_bytes: int = Field(ge=0, description="Predicted peak memory of one device.")
    device_memory_bytes: int | None = Field(default=None, description="Memory of one device, where it is known.")


class QueueStatus(Block):
    """Where the run waits."""

    name: str = Field(max_length=253, description="Kueue LocalQueue.")
    workload: str | None = Field(default=None, max_length=253, description="Kueue Workload.")
    position: int | None = Field(
        default=None, ge=1, description="Place among the waiting runs of the queue; 1 is next."
    )
    admitted_at: str | None = Field(default=None, max_length=63, description="When quota was reserved.")


class ProgressStatus(Block):
    """How far it is. At most one write in ten seconds."""

    stage: str = Field(max_length=63, description="Stage of the runtime.")
    detail: str = Field(default="", max_length=512, description="What is being done.")
    step: int = Field(ge=0, description="Steps done.")
    total_steps: int = Field(ge=0, description="Steps asked for.")
    percent: int = Field(ge=0, le=100, description="Steps done, in percent.")
    loss: Decimal | None = Field(default=None, description="Mean loss of the last steps.")
    samples_per_second: Decimal | None = Field(default=None, description="Samples per second of all processes.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Seconds to the end of training.")
    peak_memory_bytes: int | None = Field(default=None, ge=0, description="Observed peak of the busiest device.")
    updated_at: str = Field(default="", max_length=63, description="When the runtime said so.")


class CheckpointStatus(Block):
    """The newest committed checkpoint."""

    step: int = Field(ge=0, description="Step.")
    uri: str = Field(max_length=4096, description="Its manifest.")
    size_bytes: int = Field(ge=0, description="Size.")
    manifest_sha256: str = Field(max_length=64, description="SHA-256 of the manifest.")
    time: str = Field(max_length=63, description="When it was committed.")


class DataStatus(Block):
    """What became of the files found."""

    found: int = Field(ge=0, description="Files found.")
    kept: int = Field(ge=0, description="Samples trained on.")
    unreadable: int = Field(default=0, ge=0, description="Could not be read.")
    too_small: int = Field(default=0, ge=0, description="Smaller than allowed.")
    no_caption: int = Field(default=0, ge=0, description="Without caption.")
    too_short: int = Field(default=0, ge=0, description="Clips that are too short.")
    no_reference: int = Field(default=0, ge=0, description="Without a reference picture that can be read.")
    no_conditioning: int = Field(default=0, ge=0, description="Without a conditioning picture that fits.")


class ArtifactStatus(Block):
    """A published file."""

    format: str = Field(max_length=63, description="Layout: `diffusers`, `kohya`, `lycoris` or `few-steps`.")
    uri: str = Field(max_length=4096, description="Where it lies.")
    size_bytes: int = Field(ge=0, description="Size.")
    sha256: str = Field(max_length=64, description="SHA-256 of its bytes.")


class RestartsStatus(Block):
    """Restarts from a checkpoint."""

    counted: int = Field(default=0, ge=0, description="That count towards `spec.retry.maxRestarts`.")
    uncounted: int = Field(default=0, ge=0, description="That do not: preemption, a store that was down.")
    last_reason: str | None = Field(default=None, max_length=63, description="Why the last one was.")
    last_exit_code: int | None = Field(default=None, description="Exit code that decided it.")


class CostStatus(Block):
    """What it has cost so far, while all its pods had nodes."""

    gpu_seconds: int = Field(default=0, ge=0, description="Seconds that the run has held GPUs, times their number.")
    measured_at: str = Field(max_length=63, description="Up to when that is counted.")
    spent: Decimal | None = Field(default=None, description="Price of these, where the profile has a `pricePerHour`.")
    expected: Decimal | None = Field(default=None, description="Price of the whole run, by the time that is left.")
    currency: str | None = Field(default=None, max_length=3, description="Currency of the prices.")


class AttemptStatus(Block):
    """One attempt: one child object."""

    number: int = Field(ge=1, description="Number of the attempt.")
    start: str = Field(max_length=63, description="When it was made.")
    end: str | None = Field(default=None, max_length=63, description="When it ended.")
    reason: str | None = Field(default=None, max_length=63, description="How it ended.")
    message: str = Field(default="", max_length=2048, description="How it ended, for people.")
    counted: int = Field(default=0, ge=0, description="Restarts within it that count.")
    uncounted: int = Field(default=0, ge=0, description="Restarts within it that do not.")
    last_exit_code: int | None = Field(default=None, description="Exit code that ended it, or its last life.")
    to_step: int | None = Field(default=None, ge=0, description="Step that it reached.")


class RunStatus(Block):
    """What the operator has found out."""

    observed_generation: int = Field(default=0, ge=0, description="Generation of the spec that this is about.")
    phase: Phase = Field(default="Pending", description="Summary for people; programs read the conditions.")
    reason: str = Field(default="", max_length=63, description="Reason of the phase.")
    message: str = Field(default="", max_length=4096, description="The phase in a sentence.")
    attempt: int = Field(default=0, ge=0, description="Number of the present attempt; 0: none yet.")
    start_time: str | None = Field(default=None, max_length=63, description="When the first attempt was admitted.")
    completion_time: str | None = Field(default=None, max_length=63, description="When the run succeeded or failed.")
    store_uri: str | None = Field(default=None, max_length=4096, description="Root of everything the run writes.")
    plan: PlanStatus | None = Field(default=None, description="How it is executed.")
    queue: QueueStatus | None = Field(default=None, description="Where it waits.")
    progress: ProgressStatus | None = Field(default=None, description="How far it is.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="Newest checkpoint.")
    samples: Annotated[list[str], Field(max_length=MOST_SAMPLES)] = Field(
        default=[], description="Newest round of samples."
    )
    artifacts: Annotated[list[ArtifactStatus], Field(max_length=MOST_ARTIFACTS)] = Field(
        default=[], description="What was published; all of it is in `result.json` of the store."
    )
    data: DataStatus | None = Field(default=None, description="What became of the files found.")
    cost: CostStatus | None = Field(default=None, description="What it has cost. None on the CPU.")
    restarts: RestartsStatus = Field(default_factory=RestartsStatus, description="Restarts.")
    excluded_nodes: Annotated[list[str], Field(max_length=MOST_NODES_EXCLUDED)] = Field(
        default=[], description="Nodes that later attempts avoid."
    )
    attempts: Annotated[list[AttemptStatus], Field(max_length=MOST_ATTEMPTS)] = Field(
        default=[], description="The newest attempts."
    )
    conditions: Annotated[list[Condition], Field(max_length=MOST_CONDITIONS)] = Field(
        default=[], description="Conditions."
    )
