"""One pass over one run: see what is there, plan, act. The only module that awaits all three."""

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from atelier_operator.cluster import ApiError, Cluster
from atelier_operator.inventory import CHILD_KINDS, Inventory, Key, Raw
from atelier_operator.names import RUN_LABEL, UID_LABEL, child_name
from atelier_operator.observed import (
    Apis,
    Backend,
    Child,
    Observed,
    Obstacle,
    Pod,
    Quota,
    Run,
    Workload,
    is_lost,
)
from atelier_operator.plan import Event, Plan, plan
from atelier_operator.plan.attempts import present
from atelier_operator.plan.lost_nodes import stuck
from atelier_operator.polling import Poller
from atelier_operator.profiles import profile_of
from atelier_operator.snapshot import Snapshot
from atelier_operator.snapshot import read as read_snapshot
from atelier_operator.times import format_time

log = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {"JobSet": "jobset", "Job": "job"}
AT_ONCE_SECONDS = 0.05
QUEUED_LOOK_SECONDS = 30.0
"""A queued run is looked at so often for its place in the queue."""


class Reconciler:
    """Carries plans out."""

    def __init__(
        self,
        cluster: Cluster,
        inventory: Inventory,
        poller: Poller,
        *,
        clock: Callable[[], datetime],
        may_see_nodes: bool = True,
    ) -> None:
        self._cluster = cluster
        self._inventory = inventory
        self._poller = poller
        self._clock = clock
        self._may_see_nodes = may_see_nodes
        self.apis = Apis()
        self._snapshots: dict[Key, tuple[str, Snapshot | None]] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Bring a run on; gives the seconds after which it must be looked at again, if it must."""
        raw = self._inventory.run(key)
        if raw is None:
            self._poller.forget(key)
            self._snapshots.pop(key, None)
            return None
        run = Run.of(raw)
        seen = await self._observe(run)
        self._follow_progress(key, run, seen)
        decided = plan(run, seen, self._clock())
        try:
            obstacle = await self._act(run, decided)
            if obstacle:
                decided = plan(run, replace(seen, obstacle=obstacle), self._clock())
                await self._act(run, decided)
        except _Outdated:
            await self._read_again(run)
            return AT_ONCE_SECONDS
        if decided.requeue_seconds is None and decided.status.phase == "Queued":
            return QUEUED_LOOK_SECONDS
        return decided.requeue_seconds

    # --- observe ----------------------------------------------------------------------------------------------------

    async def _observe(self, run: Run) -> Observed:
        key = (run.namespace, run.name)
        profile, problem = profile_of(run, self._inventory.profile)
        children = await self._children(run, key)
        seen = Observed(
            apis=self.apis,
            profile=profile,
            profile_problem=problem,
            children=children,
            pods=tuple(map(Pod.of, self._inventory.pods(key, run.uid))),
        )
        number = present(run.status, seen)
        child = seen.child(number)
        if run.terminal or run.deleting:
            self._snapshots.pop(key, None)
        elif number:
            seen = replace(seen, snapshot=await self._snapshot(key, run, number))
        if not run.terminal and child is not None and await self._pods_are_behind(child, seen, key):
            seen = replace(seen, pods=tuple(map(Pod.of, self._inventory.pods(key, run.uid))))
        if not (run.terminal or run.deleting) and (child is None or child.finished == "Failed"):
            seen = replace(seen, quotas=await self._quotas(run.namespace))  # another attempt may have to be made
        if overdue := stuck(seen, self._clock()):
            seen = replace(seen, lost_nodes=await self._lost_nodes(overdue))
        if child is None:
            return seen
        progress = self._poller.latest(key, _life(child, seen))
        workload = self._inventory.workload(child.uid)
        if workload is None or child.queue is None:
            return replace(seen, progress=progress)
        found = Workload.of(workload)
        waiting = map(Workload.of, self._inventory.waiting(run.namespace, found.queue))
        return replace(seen, progress=progress, workload=found, waiting=tuple(waiting))

    async def _children(self, run: Run, key: Key) -> tuple[Child, ...]:
        """What the watches have brought, and where the present child is missing, what the API server has."""
        found = {
            child.name: child
            for kind in CHILD_KINDS
            for child in (Child.of(raw, BACKENDS[kind]) for raw in self._inventory.children(kind, key, run.uid))
        }
        number = run.status.attempt
        open_attempt = bool(run.status.attempts) and run.status.attempts[-1].end is None
        name = child_name(run.name, number)
        if number and open_attempt and name not in found and not run.terminal:
            for kind in CHILD_KINDS if self.apis.jobset else ("Job",):
                raw = await self._cluster.get(kind, run.namespace, name)
                if raw is not None and _belongs(raw, run):
                    self._inventory.put(kind, raw)
                    found[name] = Child.of(raw, BACKENDS[kind])
        return tuple(sorted(found.values(), key=lambda child: child.attempt))

    async def _snapshot(self, key: Key, run: Run, number: int) -> Snapshot | None:
        """What the newest attempt was made from. It is read once and never changes: its ConfigMap is immutable."""
        which = f"{run.uid}.{number}"
        known = self._snapshots.get(key)
        if known is None or known[0] != which:
            raw = await self._cluster.get("ConfigMap", run.namespace, child_name(run.name, number))
            known = self._snapshots[key] = which, read_snapshot(raw) if raw is not None and _belongs(raw, run) else None
        return known[1]

    async def _pods_are_behind(self, child: Child, seen: Observed, key: Key) -> bool:
        """Whether the child has failed and no pod of it has, as far as the watches have told. Then the pods are read: it
        depends on them whether and how the run goes on."""
        if child.finished != "Failed" or any(pod.failed for pod in seen.pods_of(child.attempt)):
            return False
        for raw in await self._cluster.list("Pod", key[0], f"{RUN_LABEL}={key[1]}"):
            self._inventory.put("Pod", raw)
        return True

    async def _lost_nodes(self, pods: tuple[Pod, ...]) -> frozenset[str]:
        """Nodes of these pods that are gone, or that the cluster has given up. In an installation for some namespaces nodes
        cannot be asked for; there an administrator removes such pods."""
        nodes = {pod.node for pod in pods if pod.node} if self._may_see_nodes else set()
        found = {node: await self._cluster.get("Node", "", node) for node in nodes}
        return frozenset(node for node, raw in found.items() if raw is None or is_lost(raw))

    async def _quotas(self, namespace: str) -> tuple[Quota, ...]:
        return tuple(map(Quota.of, await self._cluster.list("ResourceQuota", namespace)))

    def _follow_progress(self, key: Key, run: Run, seen: Observed) -> None:
        child = seen.child(present(run.status, seen))
        if child is None or run.terminal or run.deleting or child.finished:
            self._poller.watch(key, "", None)
            return
        pods = seen.pods_of(child.attempt)
        first = next((pod for pod in pods if pod.index == 0 and pod.running), None)
        self._poller.watch(key, _life(child, seen), first.ip if first else None)

    async def _read_again(self, run: Run) -> None:
        """The run has changed since the watch brought it, is gone, or another one of its name is there."""
        raw = await self._cluster.get("TrainingRun", run.namespace, run.name)
        if raw is None or raw["metadata"]["uid"] != run.uid:
            self._inventory.remove("TrainingRun", {"metadata": _identity(run)})
        if raw is not None:
            self._inventory.put("TrainingRun", raw)

    # --- act --------------------------------------------------------------------------------------------------------

    async def _act(self, run: Run, decided: Plan) -> Obstacle | None:
        """Carry a plan out. Gives what stands in the way, if anything does; then nothing else is done."""
        for manifest in decided.create:
            obstacle = await self._create(run, manifest)
            if obstacle:
                return obstacle
        for reference in decided.delete:
            force = reference.kind == "Pod"
            await self._cluster.delete(reference.kind, reference.namespace, reference.name, reference.uid, force=force)
        if decided.status != run.status:
            status = decided.status.model_dump(mode="json", by_alias=True, exclude_none=True)
            try:
                answer = await self._cluster.apply_status(_identity(run), status)
            except ApiError as error:
                if error.code in (404, 409):
                    raise _Outdated from error
                raise
            self._inventory.put("TrainingRun", answer)
        for event in decided.events:
            await self._tell(run, event)
        return None

    async def _create(self, run: Run, manifest: dict[str, Any]) -> Obstacle | None:
        kind, metadata = manifest["kind"], manifest["metadata"]
        try:
            answer: Raw | None = await self._cluster.create(manifest)
        except ApiError as error:
            if error.code in (400, 403, 422):  # by a schema, a quota or somebody's webhook
                return Obstacle(f"{kind} {metadata['name']}", refused=error.message)
            if error.code != 409:
                raise
            answer = await self._cluster.get(kind, metadata["namespace"], metadata["name"])
            if answer is not None and not _belongs(answer, run):
                return Obstacle(f"{kind} {metadata['name']}")
        if answer is not None and kind in CHILD_KINDS:
            self._inventory.put(kind, answer)
        return None

    async def _tell(self, run: Run, event: Event) -> None:
        """An Event is a comfort: where it cannot be written, the run goes on."""
        now = format_time(self._clock())
        manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{run.name}.", "namespace": run.namespace},
            "involvedObject": {
                "apiVersion": run.document["apiVersion"],
                "kind": "TrainingRun",
                "name": run.name,
                "namespace": run.namespace,
                "uid": run.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:1000],
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "atelier-operator"},
        }
        try:
            await self._cluster.create(manifest)
        except ApiError as error:
            log.warning("an event was not written", extra={"run": run.name, "error": str(error)})


class _Outdated(Exception):
    """What was seen of the run is not how it is now: nothing that was decided by it may be written."""


def _identity(run: Run) -> dict[str, str]:
    return {"namespace": run.namespace, "name": run.name, "uid": run.uid, "resourceVersion": run.version}


def _belongs(raw: Raw, run: Run) -> bool:
    return (raw["metadata"].get("labels") or {}).get(UID_LABEL) == run.uid


def _life(child: Child, seen: Observed) -> str:
    """Which life of the pods progress belongs to: an older one says nothing about the present."""
    pods = seen.pods_of(child.attempt)
    return f"{child.attempt}.{pods[0].restart if pods else child.restarts}"
