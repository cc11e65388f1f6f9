"""Progress: what the runtime tells the operator and the command line while a run goes on (`/progress` of rank 0's agent)."""

from typing import Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block

Stage = Literal["Preparing", "Caching", "Training", "Sampling", "Publishing", "Succeeded", "Stopped", "Failed"]


class FunnelReport(Block):
    """What became of the files found."""

    found: int = 0
    unreadable: int = 0
    too_small: int = 0
    no_caption: int = 0
    too_short: int = Field(default=0, description="Clips with fewer frames, or sounds of fewer seconds, than asked.")
    no_reference: int = Field(default=0, description="Samples without a reference picture that can be read.")
    no_conditioning: int = Field(default=0, description="Samples without a conditioning picture that fits.")
    kept: int = 0
    rejected: dict[str, str] = Field(default={}, description="File name to reason, at most 100.")


class CheckpointReport(Block):
    """The newest acknowledged checkpoint."""

    step: int
    manifest: str
    size_bytes: int
    manifest_sha256: str
    time: str = Field(description="RFC 3339, UTC.")


class ArtifactReport(Block):
    """A published file."""

    format: str = Field(description="Layout: `diffusers`, `kohya`, `lycoris` or `few-steps`.")
    key: str = Field(description="Its key in the store, below the run's folder.")
    size_bytes: int
    sha256: str


class Progress(Block):
    """One message. Absent facts are null, not zero."""

    stage: Stage = "Preparing"
    detail: str = Field(default="", description="What is being done, for people: `encoding captions 120/800`.")
    done: int = Field(
        default=0, description="Units done of the present stage (files while Caching, steps while Training)."
    )
    total: int = Field(default=0, description="Units of the present stage; 0: unknown.")
    step: int = 0
    total_steps: int = 0
    loss: float | None = Field(default=None, description="Mean over the last 20 steps.")
    learning_rate: float | None = None
    samples_per_second: float | None = None
    eta_seconds: float | None = Field(
        default=None, description="From the median of recent steps; start-up and sampling excluded."
    )
    peak_memory_bytes: int | None = None
    checkpoint: CheckpointReport | None = None
    funnel: FunnelReport | None = None
    samples: list[str] = Field(default=[], description="Keys of the newest round of samples.")
    artifacts: list[ArtifactReport] = Field(default=[], description="Published files, once they are in the store.")
    updated_at: str = Field(default="", description="RFC 3339, UTC.")
