"""A run and what happens to it, told step by step to the operator's `plan`: a cluster in a few dictionaries, with its own clock."""

import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.progress import Progress
from atelier_api.result import AgentResult
from atelier_api.v1alpha1.conditions import Condition
from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_api.v1alpha1.status import RunStatus
from atelier_operator.names import ATTEMPT_LABEL
from atelier_operator.observed import Apis, Backend, Child, Observed, Obstacle, Pod, Quota, Run, Workload
from atelier_operator.plan import Plan, plan
from atelier_operator.snapshot import Snapshot, read
from atelier_operator.times import format_time

Object = dict[str, Any]

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
UID = "0a1b2c3d-0000-4000-8000-000000000000"

PROFILE: Object = {
    "image": "registry.example/atelier@sha256:00",
    "gpuClasses": [{"name": "h100-80g", "memory": "80Gi"}, {"name": "l4-24g", "memory": "24Gi"}],
    "networks": [{"name": "infiniband", "environment": [{"name": "NCCL_IB_HCA", "value": "mlx5"}]}],
}
SPEC: Object = {
    "model": {"family": "sdxl", "source": "/models/base"},
    "data": {"sources": [{"uri": "s3://bucket/pictures"}], "resolution": 512},
    "hyperparameters": {"steps": 100, "globalBatchSize": 8},
    "parallelism": {"nodes": 2, "gpusPerNode": 1},
    "storage": {"uri": "s3://bucket/runs"},
}


def profile(**changes: Any) -> TrainingProfileSpec:
    """The profile with top-level fields replaced."""
    return TrainingProfileSpec.model_validate(PROFILE | changes)


def raw_run(status: Object | None = None, **spec: Any) -> Object:
    """A run as the API server has it, with blocks of its spec changed: `raw_run(schedule={"suspend": True})`."""
    document: Object = {
        "apiVersion": "atelier.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {
            "name": "knight",
            "namespace": "art",
            "uid": UID,
            "generation": 1,
            "creationTimestamp": format_time(START),
        },
        "spec": copy.deepcopy(SPEC),
    }
    for block, fields in spec.items():
        document["spec"][block] = document["spec"].get(block, {}) | fields
    if status is not None:
        document["status"] = status
    return document


def pod(index: int = 0, *, attempt: int = 1, **facts: Any) -> Pod:
    """A running pod of node `index`, with facts changed."""
    running = Pod(
        name=f"knight-{attempt}-node-0-{index}",
        uid=f"pod-{attempt}-{index}",
        attempt=attempt,
        restart=0,
        index=index,
        phase="Running",
        node=f"gpu-{index}",
        ip=f"10.0.0.{index}",
        deleting=False,
        disrupted=False,
        running=True,
    )
    return replace(running, **facts)


def ended(code: int, index: int = 0, *, at: float = 0, said: str | None = None, **facts: Any) -> Pod:
    """A pod that has ended with a code `at` seconds after START; one of the agent's codes comes with its result."""
    result = None
    time = START + timedelta(seconds=at)
    if code in set(ExitCode):
        meaning = MEANINGS[ExitCode(code)]
        result = AgentResult(
            exit_code=ExitCode(code),
            reason=meaning.reason,
            message=said or meaning.text,
            attempt="1.0",
            time=time.timestamp(),
        )
    phase = "Failed" if code else "Succeeded"
    facts = {"phase": phase, "running": False, "exit_code": code, "finished": time, "result": result} | facts
    return pod(index, **facts)


def workload(child_uid: str = "uid-knight-1", **facts: Any) -> Workload:
    """A Workload that waits for quota, with facts changed."""
    waiting = Workload(
        name="jobset-knight-1",
        owner_uid=child_uid,
        queue="gpu",
        created=START,
        priority=0,
        reserved=False,
        admitted=False,
        admitted_at=None,
        message="",
        reason="Pending",
        evicted="",
    )
    return replace(waiting, **facts)


class Story:
    """One run. `look` lets the operator look at it and carries out what it plans."""

    def __init__(self, *, jobset: bool = True, kueue: bool = False, status: Object | None = None, **spec: Any) -> None:
        self.raw = raw_run(status, **spec)
        self.apis = Apis(jobset=jobset, kueue=kueue)
        self.profile: TrainingProfileSpec | None = profile()
        self.now = START
        self.children: dict[int, Child] = {}
        self.created: list[Object] = []
        self.pods: tuple[Pod, ...] = ()
        self.workload: Workload | None = None
        self.waiting: tuple[Workload, ...] = ()
        self.quotas: tuple[Quota, ...] = ()
        self.progress: Progress | None = None
        self.obstacle: Obstacle | None = None
        self.snapshots: dict[int, Snapshot | None] = {}
        self.lost_nodes: frozenset[str] = frozenset()

    @property
    def status(self) -> RunStatus:
        return Run.of(self.raw).status

    @property
    def seen(self) -> Observed:
        return Observed(
            apis=self.apis,
            profile=self.profile,
            children=tuple(self.children.values()),
            pods=self.pods,
            workload=self.workload,
            waiting=self.waiting,
            quotas=self.quotas,
            progress=self.progress,
            obstacle=self.obstacle,
            lost_nodes=self.lost_nodes,
            snapshot=self.snapshots.get(max([self.status.attempt, *self.children])),
        )

    @property
    def child(self) -> Child:
        """The newest child."""
        return self.children[max(self.children)]

    def condition(self, kind: str) -> Condition:
        return next(each for each in self.status.conditions if each.type == kind)

    def look(self, seconds: float = 0) -> Plan:
        """The operator's next pass, some seconds later."""
        self.now += timedelta(seconds=seconds)
        decided = plan(Run.of(self.raw), self.seen, self.now)
        for manifest in decided.create:
            self._create(manifest)
        for reference in decided.delete:
            for number, child in self.children.items():
                if child.uid == reference.uid:
                    self.children[number] = replace(child, deleting=True)
        self.write(decided)
        return decided

    def lose_status(self, seconds: float = 0) -> Plan:
        """A pass after which the operator is killed: what it has made is there, its status is not."""
        before = copy.deepcopy(self.raw)
        decided = self.look(seconds)
        self.raw = before
        return decided

    def write(self, decided: Plan) -> None:
        """Write a plan's status as the API server would take it: within the bounds of the schema."""
        wire = decided.status.model_dump(mode="json", by_alias=True, exclude_none=True)
        RunStatus.model_validate(wire)
        self.raw["status"] = wire

    def _create(self, manifest: Object) -> None:
        self.created.append(manifest)
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == "ConfigMap":
            self.snapshots[int(manifest["metadata"]["labels"][ATTEMPT_LABEL])] = read(manifest)
        if kind not in ("JobSet", "Job"):
            return
        backend: Backend = "jobset" if kind == "JobSet" else "job"
        stored = copy.deepcopy(manifest)
        stored["metadata"] |= {"uid": f"uid-{name}", "creationTimestamp": format_time(self.now)}
        child = Child.of(stored, backend)
        assert child.attempt not in self.children, "a second child of the same attempt"
        self.children[child.attempt] = replace(child, suspended=child.queue is not None)

    # --- what others do ---------------------------------------------------------------------------------------------

    def change(self, **facts: Any) -> None:
        """The newest child changes."""
        self.children[self.child.attempt] = replace(self.child, **facts)

    def edit(self, block: str, **fields: Any) -> None:
        """The user changes fields of a block of the spec."""
        self.raw["spec"].setdefault(block, {}).update(fields)
        self.raw["metadata"]["generation"] += 1

    def run_pods(self, restart: int = 0) -> None:
        """All pods of the newest child run."""
        self.change(suspended=False)
        self.pods = tuple(pod(index, attempt=self.child.attempt, restart=restart) for index in range(2))

    def train(self, step: int = 10, stage: str = "Training", **facts: Any) -> None:
        """All pods run, and the agent tells how far it is."""
        self.run_pods()
        told = {"stage": stage, "step": step, "total_steps": 100} | facts
        self.progress = Progress.model_validate(told, by_name=True)

    def fail(self, *pods: Pod, **facts: Any) -> None:
        """The newest child has failed with its pods; these are given the child's attempt."""
        self.pods = tuple(replace(each, attempt=self.child.attempt) for each in pods)
        self.progress = None
        self.change(finished="Failed", finished_at=self.now, **facts)

    def complete(self) -> None:
        """The newest child has completed."""
        self.pods = tuple(ended(0, index, attempt=self.child.attempt) for index in range(2))
        self.change(finished="Completed", finished_at=self.now)

    def vanish(self) -> None:
        """The newest child is gone, with its pods."""
        del self.children[self.child.attempt]
        self.pods, self.progress, self.workload = (), None, None


def trained(**options: Any) -> Story:
    """A run whose first attempt trains."""
    story = Story(**options)
    story.look()
    story.train()
    story.look(5)
    return story
