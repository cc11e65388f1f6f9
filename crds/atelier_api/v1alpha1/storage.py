"""`spec.storage`: where checkpoints, samples, exports and the report go."""

from typing import Literal

from pydantic import Field, model_validator

from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.references import SecretRef


class CheckpointSchedule(Block):
    """When checkpoints are made and which are kept."""

    every_steps: int = Field(
        default=500, ge=0, le=10_000_000, description="Steps between checkpoints; 0: not by steps."
    )
    every_seconds: int = Field(
        default=1800, ge=0, le=604_800, description="Seconds between checkpoints; 0: not by time."
    )
    keep_last: int = Field(default=3, ge=1, le=1000, description="Newest checkpoints that are kept.")
    keep_every: int = Field(
        default=0, ge=0, le=10_000_000, description="Also keep checkpoints whose step is a multiple of this; 0: none."
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> "CheckpointSchedule":
        if self.every_steps == 0 and self.every_seconds == 0:
            raise ValueError("everySteps and everySeconds are both 0; at least one must be positive")
        return self


class Resume(Block):
    """Whether a run continues from its own checkpoints."""

    mode: Literal["Auto", "Never"] = Field(
        default="Auto",
        description="`Auto`: from the newest checkpoint that verifies. `Never`: from step 0, older checkpoints of the run are left alone.",
    )


class S3Settings(Block):
    """Connection to an S3-compatible store. Credentials come from the environment or the pod's identity, never from here."""

    endpoint: str | None = Field(
        default=None,
        max_length=2048,
        pattern=r"^https?://[^/ ]+",
        description="Endpoint URL of a private store. Default: AWS.",
    )
    region: str = Field(
        default="us-east-1", max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="Region."
    )
    addressing: Literal["path", "virtual"] = Field(
        default="path", description="Bucket in the path or in the host name."
    )
    ca_bundle: str | None = Field(
        default=None,
        max_length=2048,
        description="File with the certificate authorities that the endpoint is checked against.",
    )


class Storage(Block):
    """The store of the run."""

    uri: str = Field(
        default="runs",
        min_length=1,
        max_length=2048,
        description="A folder (relative to the run's YAML) or `s3://bucket/prefix`. The run writes below `<uri>/<namespace>/<name>-<uid>/`.",
    )
    s3: S3Settings = Field(default_factory=S3Settings, description="Connection used for every `s3://` URI of the run.")
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="On a cluster: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for every `s3://` URI of the run. Default: the pods' workload identity.",
    )
    checkpoint: CheckpointSchedule = Field(default_factory=CheckpointSchedule, description="Checkpoints.")
    resume: Resume = Field(default_factory=Resume, description="Resume.")
