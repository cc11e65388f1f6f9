"""`spec.schedule` and `spec.retry`: when a run runs, and restarts."""

from pydantic import Field

from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.references import OBJECT_NAME


class Schedule(Block):
    """Queue, suspension and time limits."""

    queue: str | None = Field(
        default=None,
        max_length=253,
        pattern=OBJECT_NAME,
        description="On a cluster: Kueue LocalQueue that the run waits in. Default: the profile's. May change while suspended.",
    )
    priority: str | None = Field(
        default=None,
        max_length=253,
        pattern=OBJECT_NAME,
        description="On a cluster: WorkloadPriorityClass with Kueue, PriorityClass without.",
    )
    suspend: bool = Field(
        default=False,
        description="On a cluster: true stops the run with a checkpoint and gives its GPUs back; false goes on from there.",
    )
    start_timeout_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31_536_000,
        description="On a cluster: the run fails when it has not started to train so long after it was made. Default: never.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31_536_000,
        description="The run is stopped, with a checkpoint, this long after its start. Default: none.",
    )
    termination_grace_seconds: int = Field(
        default=120, ge=5, le=3600, description="Time between the request to stop and SIGKILL, for the last checkpoint."
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=315_360_000,
        description="On a cluster: the object is deleted so long after its end; what lies in the store stays. Default: never.",
    )


class Retry(Block):
    """What happens after a failure that a restart may cure (a lost process, a collective timeout, a GPU fault)."""

    max_restarts: int = Field(
        default=3, ge=0, le=100, description="Restarts from the newest checkpoint before the run fails."
    )
    backoff_seconds: int = Field(
        default=5, ge=0, le=3600, description="Pause before the first restart; doubled after each."
    )
