"""The API server in memory, for unit tests of the operator: what `Cluster` offers, with the server's versions, uids and refusals.

`Engines` does by order what JobSet, Kubernetes' Job controller, the kubelets and the garbage collector would do by themselves.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_api.v1alpha1.status import RunStatus
from atelier_operator.cluster import ApiError
from atelier_operator.inventory import Inventory
from atelier_operator.names import ATTEMPT_LABEL, CONTAINER, RESTART_LABEL, RUN_LABEL
from atelier_operator.times import format_time
from chart_rights import is_allowed

Object = dict[str, Any]
Place = tuple[str, str]

WATCHED = ("TrainingRun", "TrainingProfile", "ClusterTrainingProfile", "JobSet", "Job", "Pod", "Workload")
LABELLED = ("JobSet", "Job", "Pod")


class MemoryCluster:
    """Objects by kind, namespace and name. `interrupt` is told of each call before anything is done ("asked") and of each
    write once it is stored ("stored"), with the verb and the kind; what it raises is what the caller sees."""

    def __init__(self, clock: Callable[[], datetime], *, jobset: bool = True, kueue: bool = False) -> None:
        self._clock = clock
        self._served = {"JobSet": jobset, "Workload": kueue}
        self._objects: dict[str, dict[Place, Object]] = {}
        self._version = 0
        self._numbers = itertools.count(1)
        self.made: Counter[tuple[str, str]] = Counter()
        self.calls: list[tuple[str, str, str]] = []
        self.changes: list[tuple[str, str, Object]] = []
        self.statuses: list[Object] = []
        self.forced: set[str] = set()
        self.interrupt: Callable[[str, str, str], None] = lambda *_: None

    # --- the calls of `Cluster` ---------------------------------------------------------------------------------------

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        self._ask("GET", kind, name)
        return copy.deepcopy(self._objects.get(kind, {}).get((namespace, name)))

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> list[Object]:
        self._ask("GET", kind, "")
        return [each for each in self.all(kind) if namespace in (None, _place(each)[0]) and _selected(each, selector)]

    async def create(self, manifest: Object) -> Object:
        metadata = manifest["metadata"]
        name = metadata.get("name") or f"{metadata['generateName']}{next(self._numbers)}"
        self._ask("POST", manifest["kind"], name)
        answer = self.make(manifest | {"metadata": metadata | {"name": name}})
        self.interrupt("stored", "POST", manifest["kind"])
        return answer

    async def delete(self, kind: str, namespace: str, name: str, uid: str, *, force: bool = False) -> None:
        self._ask("DELETE", kind, name)
        found = self._objects.get(kind, {}).get((namespace, name))
        if force and found is not None and found["metadata"]["uid"] == uid:
            self.forced.add(name)
            self.remove(found)
        elif found is not None and found["metadata"]["uid"] == uid and "deletionTimestamp" not in found["metadata"]:
            found["metadata"]["deletionTimestamp"] = format_time(self._clock())
            self.store(found)
        self.interrupt("stored", "DELETE", kind)

    async def apply_status(self, metadata: Object, status: Object) -> Object:
        self._ask("PATCH", "TrainingRun", metadata["name"])
        found = self._objects.get("TrainingRun", {}).get(_place({"metadata": metadata}))
        if found is None:
            raise ApiError(404, f'trainingruns.atelier.dev "{metadata["name"]}" not found')
        for field in ("uid", "resourceVersion"):
            if metadata.get(field, found["metadata"][field]) != found["metadata"][field]:
                raise ApiError(409, f"{field}: the object has been modified")
        try:
            RunStatus.model_validate(status)
        except ValidationError as error:
            raise ApiError(422, str(error)) from error
        if found.get("status") != status:
            found["status"] = copy.deepcopy(status)
            self.statuses.append(copy.deepcopy(status))
            self.store(found)
        self.interrupt("stored", "PATCH", "TrainingRun")
        return copy.deepcopy(found)

    async def replace(self, manifest: Object) -> Object:
        self._ask("PUT", manifest["kind"], manifest["metadata"]["name"])
        found = self._objects.get(manifest["kind"], {}).get(_place(manifest))
        if found is None:
            raise ApiError(404, "not found")
        if found["metadata"]["resourceVersion"] != manifest["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified")
        stored = self.store(copy.deepcopy(manifest))
        self.interrupt("stored", "PUT", manifest["kind"])
        return stored

    async def serves(self, kind: str) -> bool:
        self._ask("GET", "APIResourceList", kind)
        return self._served.get(kind, True)

    async def close(self) -> None:
        """There is no connection."""

    # --- what tests and engines do, by themselves ---------------------------------------------------------------------

    def all(self, kind: str) -> "list[Object]":
        return copy.deepcopy(list(self._objects.get(kind, {}).values()))

    def make(self, manifest: Object) -> Object:
        """Store a new object. Raises ApiError 409 where there is one of its name."""
        kind, place = manifest["kind"], _place(manifest)
        if place in self._objects.get(kind, {}):
            raise ApiError(409, f'{kind} "{place[1]}" already exists')
        if len(place[1]) > 253:
            raise ApiError(422, f"metadata.name: Invalid value: {place[1]}: must be no more than 253 characters")
        stored = copy.deepcopy(manifest)
        time = format_time(self._clock())
        stored["metadata"] |= {"uid": f"uid-{next(self._numbers)}", "creationTimestamp": time, "generation": 1}
        self._objects.setdefault(kind, {})[place] = stored
        self.made[(kind, place[1])] += 1
        return self.store(stored, "ADDED")

    def edit(self, kind: str, name: str, change: Callable[[Object], object]) -> Object:
        """Change the object of that name, in whatever namespace; another spec is another generation."""
        found = next(each for each in self._objects[kind].values() if each["metadata"]["name"] == name)
        spec = copy.deepcopy(found.get("spec"))
        change(found)
        found["metadata"]["generation"] += found.get("spec") != spec
        return self.store(found)

    def store(self, raw: Object, event: str = "MODIFIED") -> Object:
        self._version += 1
        raw["metadata"]["resourceVersion"] = str(self._version)
        self._objects.setdefault(raw["kind"], {})[_place(raw)] = raw
        self.changes.append((event, raw["kind"], copy.deepcopy(raw)))
        return copy.deepcopy(raw)

    def remove(self, raw: Object) -> None:
        self._version += 1
        gone = self._objects[raw["kind"]].pop(_place(raw))
        gone["metadata"]["resourceVersion"] = str(self._version)
        self.changes.append(("DELETED", raw["kind"], gone))

    def collect(self) -> None:
        """The garbage collector: what has an owner goes with it; a deleted owner goes once nothing is left below it."""
        while any(self._collect(raw) for raw in self._stored()):
            pass

    def _stored(self) -> "list[Object]":
        """The objects themselves, for who only looks at them: copies of all of them for each one take minutes."""
        return [raw for objects in self._objects.values() for raw in objects.values()]

    def _collect(self, raw: Object) -> bool:
        uids = {each["metadata"]["uid"]: each for each in self._stored()}
        if raw["metadata"]["uid"] not in uids:
            return False
        owners = [uids.get(each["uid"]) for each in raw["metadata"].get("ownerReferences") or ()]
        below = [each for each in uids.values() if raw["metadata"]["uid"] in _owners(each)]
        doomed = "deletionTimestamp" in raw["metadata"] or (
            owners and all(owner is None or "deletionTimestamp" in owner["metadata"] for owner in owners)
        )
        if doomed and not below:
            self.remove(raw)
            return True
        if doomed and "deletionTimestamp" not in raw["metadata"]:
            self.edit(
                raw["kind"],
                raw["metadata"]["name"],
                lambda each: each["metadata"].update(deletionTimestamp=format_time(self._clock())),
            )
            return True
        return False

    def _ask(self, verb: str, kind: str, name: str) -> None:
        self.calls.append((verb, kind, name))
        if kind != "Lease" and not is_allowed(verb, kind, name, "status" if verb == "PATCH" else ""):
            raise ApiError(403, f"{verb} {kind} is forbidden: the chart's roles do not allow it")
        self.interrupt("asked", verb, kind)


class Engines:
    """What becomes of children."""

    def __init__(self, cluster: MemoryCluster, clock: Callable[[], datetime]) -> None:
        self._cluster = cluster
        self._clock = clock

    def child(self, name: str) -> Object:
        found = [*self._cluster.all("JobSet"), *self._cluster.all("Job")]
        return next(each for each in found if each["metadata"]["name"] == name)

    def run_pods(self, name: str, nodes: int = 2) -> None:
        """The pods of a child's present life come, and run."""
        child = self.child(name)
        restart = (child.get("status") or {}).get("restarts", 0)
        for index in range(nodes):
            labels = {**child["metadata"]["labels"], RESTART_LABEL: str(restart)}
            owner = {"kind": child["kind"], "name": name, "uid": child["metadata"]["uid"], "controller": True}
            metadata = {
                "name": f"{name}-{restart}-{index}",
                "namespace": child["metadata"]["namespace"],
                "labels": labels,
                "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
                "ownerReferences": [owner],
            }
            running = {"name": CONTAINER, "state": {"running": {"startedAt": format_time(self._clock())}}}
            status = {"phase": "Running", "podIP": f"10.0.0.{index + 1}", "containerStatuses": [running]}
            spec = {"nodeName": f"gpu-{index}"}
            self._cluster.make({"kind": "Pod", "metadata": metadata, "spec": spec, "status": status})

    def end_pods(self, name: str, *codes: int) -> None:
        """The pods of a child's present life end, each with its code."""
        child = self.child(name)
        restart = str((child.get("status") or {}).get("restarts", 0))
        pods = [pod for pod in self._pods(child) if pod["metadata"]["labels"][RESTART_LABEL] == restart]
        for pod, code in zip(pods, codes, strict=True):
            status = {
                "phase": "Failed" if code else "Succeeded",
                "podIP": pod["status"].get("podIP"),
                "containerStatuses": [{"name": CONTAINER, "state": {"terminated": self._terminated(pod, code)}}],
            }
            self._cluster.edit("Pod", pod["metadata"]["name"], lambda each, status=status: each.update(status=status))

    def restart(self, name: str, *, counted: bool) -> None:
        """The JobSet starts its pods once more."""
        child = self.child(name)
        for pod in self._pods(child):
            self._cluster.remove(pod)
        status = dict(child.get("status") or {})
        status["restarts"] = status.get("restarts", 0) + 1
        status["restartsCountTowardsMax"] = status.get("restartsCountTowardsMax", 0) + counted
        self._cluster.edit(child["kind"], name, lambda each: each.update(status=status))
        self.run_pods(name)

    def fail(self, name: str, reason: str, message: str = "") -> None:
        self._finish(name, "Failed", reason, message)

    def complete(self, name: str) -> None:
        self._finish(name, "Completed" if self.child(name)["kind"] == "JobSet" else "Complete", "", "")

    def settle(self) -> None:
        """Pods of deleted children commit their checkpoint and end; what is deleted goes."""
        for child in [*self._cluster.all("JobSet"), *self._cluster.all("Job")]:
            if "deletionTimestamp" in child["metadata"]:
                for pod in self._pods(child):
                    self._cluster.remove(pod)
        self._cluster.collect()

    def _finish(self, name: str, kind: str, reason: str, message: str) -> None:
        child = self.child(name)
        time = format_time(self._clock())
        end = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": time}
        status = dict(child.get("status") or {}) | {"conditions": [end]}
        self._cluster.edit(child["kind"], name, lambda each: each.update(status=status))

    def _pods(self, child: Object) -> list[Object]:
        return [pod for pod in self._cluster.all("Pod") if child["metadata"]["uid"] in _owners(pod)]

    def _terminated(self, pod: Object, code: int) -> Object:
        now = self._clock()
        ended = {"exitCode": code, "finishedAt": format_time(now)}
        if code not in set(ExitCode):
            return ended
        meaning = MEANINGS[ExitCode(code)]
        result = AgentResult(
            exit_code=ExitCode(code),
            reason=meaning.reason,
            message=meaning.text,
            attempt=f"{pod['metadata']['labels'][ATTEMPT_LABEL]}.{pod['metadata']['labels'][RESTART_LABEL]}",
            time=now.timestamp(),
        )
        return ended | {"message": result.model_dump_json(by_alias=True)}


class Watches:
    """Brings an inventory what has changed, `late` by so many rounds, a number for each kind. The first round is the list."""

    def __init__(self, cluster: MemoryCluster, inventory: Inventory, late: dict[str, int] | None = None) -> None:
        self._cluster = cluster
        self._inventory = inventory
        self._late = late or {}
        self._read = len(cluster.changes)
        self._coming: dict[str, list[tuple[int, str, Object]]] = {kind: [] for kind in WATCHED}
        self._round = 0
        for kind in WATCHED:
            for raw in cluster.all(kind):
                if _watched(kind, raw):
                    inventory.put(kind, raw)

    def bring(self) -> None:
        """One round."""
        self._round += 1
        for event, kind, raw in self._cluster.changes[self._read :]:
            if kind in WATCHED and _watched(kind, raw):
                self._coming[kind].append((self._round + self._late.get(kind, 0), event, raw))
        self._read = len(self._cluster.changes)
        for kind, coming in self._coming.items():
            while coming and coming[0][0] <= self._round:
                _, event, raw = coming.pop(0)
                take = self._inventory.remove if event == "DELETED" else self._inventory.put
                take(kind, copy.deepcopy(raw))

    def behind(self) -> bool:
        """Whether anything is still to be brought."""
        return self._read < len(self._cluster.changes) or any(self._coming.values())


def _watched(kind: str, raw: Object) -> bool:
    return kind not in LABELLED or RUN_LABEL in (raw["metadata"].get("labels") or {})


def _place(raw: Object) -> Place:
    return raw["metadata"].get("namespace") or "", raw["metadata"]["name"]


def _owners(raw: Object) -> Iterable[str]:
    return [each["uid"] for each in raw["metadata"].get("ownerReferences") or ()]


def _selected(raw: Object, selector: str) -> bool:
    labels = raw["metadata"].get("labels") or {}
    return all(
        labels.get(term.partition("=")[0]) == term.partition("=")[2] if "=" in term else term in labels
        for term in selector.split(",")
        if term
    )
