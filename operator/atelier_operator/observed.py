"""What the operator sees of a run: plain values read from the API's objects. Pure.

Objects come from other controllers and other versions, so everything but the identity may be missing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from atelier_api.progress import Progress
from atelier_api.result import AgentResult
from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_api.v1alpha1.status import RunStatus
from atelier_operator.names import (
    ATTEMPT_LABEL,
    CONTAINER,
    MODEL_CONTAINER,
    PLAN_ANNOTATION,
    QUEUE_LABEL,
    RESTART_LABEL,
    STEPS_ANNOTATION,
    UNREACHABLE_TAINT,
)
from atelier_operator.snapshot import Snapshot
from atelier_operator.times import parse_time

Raw = Mapping[str, Any]
Backend = Literal["jobset", "job"]


READ_OF_SPEC: Mapping[str, tuple[str, ...]] = {
    "Pod": ("nodeName",),
    "JobSet": ("suspend",),
    "Job": ("suspend",),
    "Workload": ("queueName", "priority"),
}
"""What is read of the spec of those kinds; of others all may be."""


def only_what_is_read(kind: str, raw: Raw) -> Raw:
    """An object without what nobody here looks at: who manages which field and templates of pods are most of what the API
    server sends."""
    metadata = {name: value for name, value in raw["metadata"].items() if name != "managedFields"}
    if kind not in READ_OF_SPEC:
        return {**raw, "metadata": metadata}
    spec = raw.get("spec") or {}
    return {**raw, "metadata": metadata, "spec": {name: spec[name] for name in READ_OF_SPEC[kind] if name in spec}}


@dataclass(frozen=True)
class Run:
    """A TrainingRun. `document` is what the user wrote, as the API server stores it; `version` is its resourceVersion."""

    namespace: str
    name: str
    uid: str
    generation: int
    created: datetime | None
    deleting: bool
    document: Raw
    status: RunStatus
    version: str = ""

    @classmethod
    def of(cls, raw: Raw) -> "Run":
        metadata = raw["metadata"]
        document = {
            "apiVersion": raw.get("apiVersion"),
            "kind": raw.get("kind"),
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
            "spec": raw.get("spec"),
        }
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            created=parse_time(metadata.get("creationTimestamp")),
            deleting="deletionTimestamp" in metadata,
            document=document,
            status=_status(raw.get("status")),
            version=metadata.get("resourceVersion", ""),
        )

    @property
    def terminal(self) -> bool:
        """Whether it has succeeded or failed: then nothing of it changes any more."""
        return self.status.phase in ("Succeeded", "Failed")


def _status(raw: Any) -> RunStatus:
    """The status, without what another version has written and this one cannot read: a run that has ended stays ended."""
    fields = dict(raw or {})
    while True:
        try:
            return RunStatus.model_validate(fields, extra="ignore")
        except ValidationError as error:
            for place in {each["loc"][0] for each in error.errors()}:
                del fields[place]


@dataclass(frozen=True)
class Child:
    """The JobSet or Job of an attempt. `suspended`: Kueue has not let it start, or has stopped it. `steps` and `plan` are
    what it was made with; `finished_at`, `reason` and `message` are those of its end."""

    backend: Backend
    name: str
    uid: str
    attempt: int
    created: datetime | None
    deleting: bool
    suspended: bool
    queue: str | None
    steps: int
    plan: ExecutionPlan | None = None
    finished: Literal["Completed", "Failed"] | None = None
    finished_at: datetime | None = None
    reason: str = ""
    message: str = ""
    restarts: int = 0
    restarts_counted: int = 0

    @classmethod
    def of(cls, raw: Raw, backend: Backend) -> "Child":
        metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
        labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
        true = {each["type"]: each for each in status.get("conditions") or () if each.get("status") == "True"}
        finished = next((name for name in ("Completed", "Complete", "Failed") if name in true), None)
        end: Raw = true[finished] if finished else {}
        return cls(
            backend=backend,
            name=metadata["name"],
            uid=metadata["uid"],
            attempt=_number(labels.get(ATTEMPT_LABEL)),
            created=parse_time(metadata.get("creationTimestamp")),
            deleting="deletionTimestamp" in metadata,
            suspended=bool(spec.get("suspend")),
            queue=labels.get(QUEUE_LABEL),
            steps=_number(annotations.get(STEPS_ANNOTATION)),
            plan=_plan(annotations.get(PLAN_ANNOTATION)),
            finished=None if finished is None else "Failed" if finished == "Failed" else "Completed",
            finished_at=parse_time(end.get("lastTransitionTime")),
            reason=end.get("reason", ""),
            message=end.get("message", ""),
            restarts=status.get("restarts") or 0,
            restarts_counted=status.get("restartsCountTowardsMax") or 0,
        )


def _plan(text: str | None) -> ExecutionPlan | None:
    try:
        return ExecutionPlan.model_validate_json(text) if text else None
    except ValidationError:
        return None


@dataclass(frozen=True)
class Pod:
    """A training pod. `result` are the terminal facts that its agent left, `waiting` is why its container has not started,
    `failure` is what the node says of a pod that it has failed itself. `gone_by`: it is to go, and its grace ends then; None
    also where it was removed by force."""

    name: str
    uid: str
    attempt: int
    restart: int
    index: int
    phase: str
    node: str | None
    ip: str | None
    deleting: bool
    disrupted: bool
    unschedulable: str = ""
    waiting: str = ""
    waiting_message: str = ""
    running: bool = False
    exit_code: int | None = None
    exit_reason: str = ""
    finished: datetime | None = None
    failure: str = ""
    result: AgentResult | None = None
    gone_by: datetime | None = None
    created: datetime | None = None

    @property
    def failed(self) -> bool:
        """Whether it has ended badly. A pod that was evicted before its container ran has no exit code."""
        return self.exit_code not in (None, 0) or self.phase == "Failed"

    @property
    def ended(self) -> bool:
        return self.exit_code is not None or self.phase in ("Succeeded", "Failed")

    @classmethod
    def of(cls, raw: Raw) -> "Pod":
        metadata, status = raw["metadata"], raw.get("status") or {}
        labels = metadata.get("labels") or {}
        annotations = metadata.get("annotations") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or ()}
        scheduled = conditions.get("PodScheduled") or {}
        containers = [*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())]
        states = [(each.get("name"), each.get("state") or {}) for each in containers]
        state: Raw = next(
            (state for name, state in states if name == CONTAINER), {}
        )  # others may be put in by webhooks
        waiting: Raw = next((state["waiting"] for _, state in states if state.get("waiting")), {})
        fetching: Raw = next((state for name, state in states if name == MODEL_CONTAINER), {})
        ended = state.get("terminated") or {}
        if (fetching.get("terminated") or {}).get("exitCode"):
            ended = fetching["terminated"]  # the trainer has never begun
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            attempt=_number(labels.get(ATTEMPT_LABEL)),
            restart=_number(labels.get(RESTART_LABEL)),
            index=_number(annotations.get("batch.kubernetes.io/job-completion-index")),
            phase=status.get("phase") or "Pending",
            node=(raw.get("spec") or {}).get("nodeName"),
            ip=status.get("podIP"),
            deleting="deletionTimestamp" in metadata,
            disrupted=(conditions.get("DisruptionTarget") or {}).get("status") == "True",
            unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
            waiting=waiting.get("reason", ""),
            waiting_message=waiting.get("message", ""),
            running="running" in state,
            exit_code=ended.get("exitCode"),
            exit_reason=ended.get("reason", ""),
            finished=parse_time(ended.get("finishedAt")),
            failure=status.get("message") or status.get("reason") or _not_begun(ended),
            result=_result(ended.get("message")),
            created=parse_time(metadata.get("creationTimestamp")),
            gone_by=parse_time(metadata.get("deletionTimestamp"))
            if metadata.get("deletionGracePeriodSeconds")
            else None,
        )


def _not_begun(ended: Raw) -> str:
    """What the container runtime says of a container that it could not start."""
    return str(ended.get("message") or "") if ended.get("reason") in ("StartError", "ContainerCannotRun") else ""


def _result(text: str | None) -> AgentResult | None:
    try:
        return AgentResult.model_validate_json(text) if text else None
    except ValidationError:
        return None


def is_lost(node: Raw) -> bool:
    """Whether the cluster has given a node up: it is not ready, and tainted as one that does not answer."""
    conditions = {each["type"]: each for each in (node.get("status") or {}).get("conditions") or ()}
    taints = {each.get("key") for each in (node.get("spec") or {}).get("taints") or ()}
    return (conditions.get("Ready") or {}).get("status") != "True" and UNREACHABLE_TAINT in taints


@dataclass(frozen=True)
class Workload:
    """Kueue's view of a child: whether it has quota, and why not."""

    name: str
    owner_uid: str
    queue: str
    created: datetime | None
    priority: int
    reserved: bool
    admitted: bool
    admitted_at: str | None
    message: str
    reason: str
    evicted: str

    @classmethod
    def of(cls, raw: Raw) -> "Workload":
        metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or ()}
        reserved, admitted = conditions.get("QuotaReserved") or {}, conditions.get("Admitted") or {}
        evicted = conditions.get("Evicted") or {}
        is_admitted = admitted.get("status") == "True"
        return cls(
            name=metadata["name"],
            owner_uid=next((owner["uid"] for owner in metadata.get("ownerReferences") or ()), ""),
            queue=spec.get("queueName") or "",
            created=parse_time(metadata.get("creationTimestamp")),
            priority=spec.get("priority") or 0,
            reserved=reserved.get("status") == "True",
            admitted=is_admitted,
            admitted_at=admitted.get("lastTransitionTime") if is_admitted else None,
            message=reserved.get("message", ""),
            reason=reserved.get("reason", ""),
            evicted=evicted.get("reason", "") if evicted.get("status") == "True" else "",
        )


@dataclass(frozen=True)
class Quota:
    """A ResourceQuota of the namespace: hard limits and what is used, by resource. `scoped`: it is for some pods only."""

    name: str
    hard: Mapping[str, str]
    used: Mapping[str, str]
    scoped: bool = False

    @classmethod
    def of(cls, raw: Raw) -> "Quota":
        spec, status = raw.get("spec") or {}, raw.get("status") or {}
        scoped = bool(spec.get("scopes") or spec.get("scopeSelector"))
        return cls(raw["metadata"]["name"], status.get("hard") or {}, status.get("used") or {}, scoped)


@dataclass(frozen=True)
class Apis:
    """Which engines the cluster serves."""

    jobset: bool = False
    kueue: bool = False


@dataclass(frozen=True)
class Obstacle:
    """Why an object of the next attempt could not be made: one of its name is not ours, or the API server has refused it."""

    name: str
    refused: str = ""


@dataclass(frozen=True)
class Observed:
    """Everything that the plan of one run depends on, besides the run and the time.

    `workload` is that of the newest child, `waiting` all workloads of its queue that have no quota, `snapshot` what the newest
    attempt was made from, `obstacle` what stood in the way of an attempt that this pass has tried to make. `profile` None: there
    is no such profile; `profile_problem` says why one that exists cannot be used. `lost_nodes` are those, of nodes with pods that
    should have been gone long ago, that the cluster has given up.
    """

    apis: Apis
    profile: TrainingProfileSpec | None
    profile_problem: str = ""
    children: tuple[Child, ...] = ()
    pods: tuple[Pod, ...] = ()
    workload: Workload | None = None
    waiting: tuple[Workload, ...] = ()
    quotas: tuple[Quota, ...] = ()
    progress: Progress | None = None
    snapshot: Snapshot | None = None
    lost_nodes: frozenset[str] = frozenset()
    obstacle: Obstacle | None = None

    def child(self, attempt: int) -> Child | None:
        """The child of an attempt. One without the label of an attempt is nobody's."""
        return next((child for child in self.children if child.attempt == attempt > 0), None)

    def pods_of(self, attempt: int) -> tuple[Pod, ...]:
        """Pods of the newest life of an attempt."""
        own = [pod for pod in self.pods if pod.attempt == attempt]
        newest = max((pod.restart for pod in own), default=0)
        return tuple(sorted((pod for pod in own if pod.restart == newest), key=lambda pod: pod.index))


def read_profile(raw: Raw) -> tuple[TrainingProfileSpec | None, str]:
    """The profile, or why it cannot be used."""
    try:
        return TrainingProfileSpec.model_validate(raw.get("spec") or {}), ""
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return None, f"spec.{place}: {first['msg']} (value {json.dumps(first.get('input'), default=str)[:80]})"


def _number(text: Any) -> int:
    """The number in a label; 0 where there is none."""
    return int(text) if isinstance(text, str) and text.isdecimal() else 0
