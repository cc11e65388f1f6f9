"""What a plan is made of: values that `reconcile` carries out."""

from dataclasses import dataclass
from typing import Any, Literal

from atelier_api.v1alpha1.status import RunStatus


@dataclass(frozen=True)
class Ref:
    """An object to delete: that very one. A pod is removed by force, without its node's answer."""

    kind: Literal["TrainingRun", "JobSet", "Job", "Pod"]
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Event:
    """A line in `kubectl describe`. Sent after the status that it tells of is written."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """`create` in order, then `delete`, then the status, then the events. Wake the run again after `requeue_seconds`."""

    status: RunStatus
    create: tuple[dict[str, Any], ...] = ()
    delete: tuple[Ref, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_seconds: float | None = None
