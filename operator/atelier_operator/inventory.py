"""The objects that the watches have brought, found by the run they belong to. What the operator wrote itself is put in at once.

An answer of the API server to a write can be newer than what the watch has brought, and the watch can bring an older state after
it: the newer one, by resourceVersion, stays.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from atelier_operator.names import QUEUE_LABEL, RUN_LABEL, UID_LABEL
from atelier_operator.observed import only_what_is_read
from atelier_operator.profiles import profile_reference

Raw = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name of a run."""

CHILD_KINDS = ("JobSet", "Job")


class Inventory:
    """Objects by kind, namespace and name."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[Key, Raw]] = defaultdict(dict)
        self._of_run: dict[tuple[str, Key], set[Key]] = defaultdict(set)
        self._child_of_uid: dict[str, Key] = {}
        self._workload_of_uid: dict[str, Key] = {}
        self._waiting: dict[Key, set[Key]] = defaultdict(set)

    def put(self, kind: str, raw: Raw) -> Key | None:
        """Take an object in; gives the run that it concerns, if it is newer than what is known."""
        place = _place(raw)
        known = self._objects[kind].get(place)
        if known is not None and _version(known) > _version(raw):
            return None
        if known is not None:
            self._forget(kind, place, known)
        self._objects[kind][place] = kept = only_what_is_read(kind, raw)
        return self._remember(kind, place, kept)

    def remove(self, kind: str, raw: Raw) -> Key | None:
        """Forget an object; gives the run that it concerned."""
        place = _place(raw)
        known = self._objects[kind].get(place)
        if known is None or not _same_object(known, raw):
            return None
        run = self._run_of(kind, known)
        del self._objects[kind][place]
        self._forget(kind, place, known)
        return run

    def names(self, kind: str, namespace: str | None) -> dict[Key, str]:
        """Uids of the objects of a kind, in a namespace or in all."""
        found = self._objects[kind].items()
        return {place: raw["metadata"].get("uid", "") for place, raw in found if namespace in (None, place[0])}

    def keep(self, kind: str, known: Mapping[Key, str], there: Iterable[Raw]) -> set[Key]:
        """Forget those of `known` that are not `there`: their end was missed by the watch. Gives the runs that they concerned."""
        alive = {raw["metadata"].get("uid", "") for raw in there}
        gone = ((place, uid) for place, uid in known.items() if uid not in alive)
        runs = {
            self.remove(kind, {"metadata": {"namespace": namespace, "name": name, "uid": uid}})
            for (namespace, name), uid in gone
        }
        return {run for run in runs if run is not None}

    def run(self, key: Key) -> Raw | None:
        return self._objects["TrainingRun"].get(key)

    def runs(self) -> list[Key]:
        return list(self._objects["TrainingRun"])

    def profile(self, kind: str, namespace: str, name: str) -> Raw | None:
        """A profile; those of the cluster have no namespace."""
        return self._objects[kind].get((namespace if kind == "TrainingProfile" else "", name))

    def children(self, kind: str, key: Key, uid: str) -> list[Raw]:
        """JobSets or Jobs of a run, without the Jobs that a JobSet has made."""
        return [raw for raw in self._belonging(kind, key, uid) if _owner(raw).get("uid") == uid]

    def pods(self, key: Key, uid: str) -> list[Raw]:
        return self._belonging("Pod", key, uid)

    def workload(self, child_uid: str) -> Raw | None:
        """Kueue's Workload of a child."""
        place = self._workload_of_uid.get(child_uid)
        return None if place is None else self._objects["Workload"].get(place)

    def waiting(self, namespace: str, queue: str) -> list[Raw]:
        """Workloads of a queue without quota."""
        return [self._objects["Workload"][place] for place in self._waiting.get((namespace, queue), ())]

    def using_profile(self, kind: str, namespace: str, name: str) -> Iterable[Key]:
        """Runs that name a profile."""
        for key, raw in self._objects["TrainingRun"].items():
            if profile_reference(raw.get("spec")) == (kind, name) and namespace in ("", key[0]):
                yield key

    def _belonging(self, kind: str, key: Key, uid: str) -> list[Raw]:
        found = (self._objects[kind][place] for place in self._of_run.get((kind, key), ()))
        return [raw for raw in found if _labels(raw).get(UID_LABEL) == uid]

    def _run_of(self, kind: str, raw: Raw) -> Key | None:
        namespace, name = _place(raw)
        if kind == "TrainingRun":
            return namespace, name
        if kind == "Workload":
            return self._child_of_uid.get(_owner(raw).get("uid", ""))
        run = _labels(raw).get(RUN_LABEL)
        return (namespace, run) if run else None

    def _remember(self, kind: str, place: Key, raw: Raw) -> Key | None:
        run = self._run_of(kind, raw)
        if kind == "Workload":
            self._workload_of_uid[_owner(raw).get("uid", "")] = place
            if not _has_quota(raw):
                self._waiting[_queue(raw)].add(place)
        elif kind != "TrainingRun" and run is not None:
            self._of_run[(kind, run)].add(place)
            if kind in CHILD_KINDS and QUEUE_LABEL in _labels(raw):
                self._child_of_uid[raw["metadata"]["uid"]] = run
        return run

    def _forget(self, kind: str, place: Key, raw: Raw) -> None:
        if kind == "Workload":
            owner = _owner(raw).get("uid", "")
            if self._workload_of_uid.get(owner) == place:  # not where Kueue has made another one for the same child
                del self._workload_of_uid[owner]
            self._waiting[_queue(raw)].discard(place)
            return
        run = self._run_of(kind, raw)
        if kind != "TrainingRun" and run is not None:
            places = self._of_run[(kind, run)]
            places.discard(place)
            if not places:
                del self._of_run[(kind, run)]
            self._child_of_uid.pop(raw["metadata"]["uid"], None)


def _place(raw: Raw) -> Key:
    return raw["metadata"].get("namespace") or "", raw["metadata"]["name"]


def _labels(raw: Raw) -> Mapping[str, str]:
    return raw["metadata"].get("labels") or {}


def _owner(raw: Raw) -> Mapping[str, Any]:
    """The controlling owner."""
    owners = raw["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), owners[0] if owners else {})


def _same_object(one: Raw, other: Raw) -> bool:
    return bool(one["metadata"].get("uid") == other["metadata"].get("uid"))


def _version(raw: Raw) -> int:
    """resourceVersions of one kind are ordered numbers (KEP-5504)."""
    text = raw["metadata"].get("resourceVersion", "")
    return int(text) if text.isdecimal() else 0


def _queue(raw: Raw) -> Key:
    return _place(raw)[0], (raw.get("spec") or {}).get("queueName") or ""


def _has_quota(raw: Raw) -> bool:
    conditions = (raw.get("status") or {}).get("conditions") or ()
    return any(each["type"] in ("QuotaReserved", "Finished") and each.get("status") == "True" for each in conditions)
