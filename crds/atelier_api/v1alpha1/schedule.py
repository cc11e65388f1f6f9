"""`spec.schedule` and `spec.retry`: deadlines and restarts."""

from pydantic import Field

from atelier_api.v1alpha1.base import Block


class Schedule(Block):
    """Time limits."""

    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31_536_000,
        description="The run is stopped, with a checkpoint, this long after its start. Default: none.",
    )
    termination_grace_seconds: int = Field(
        default=120, ge=5, le=3600, description="Time between the request to stop and SIGKILL, for the last checkpoint."
    )


class Retry(Block):
    """What happens after a failure that a restart may cure (a lost process, a collective timeout, a GPU fault)."""

    max_restarts: int = Field(
        default=3, ge=0, le=100, description="Restarts from the newest checkpoint before the run fails."
    )
    backoff_seconds: int = Field(
        default=5, ge=0, le=3600, description="Pause before the first restart; doubled after each."
    )
