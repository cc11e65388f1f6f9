"""What must hold at every moment of every run, checked against the API server's own record of all that was written.

The record is the audit log: each write with the object as it was stored, in the order of resourceVersions. A test that looks now and
then does not see two gangs that were alive together for a second; this does.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from atelier_operator.names import ATTEMPT_LABEL, RESTART_LABEL, RUN_LABEL, UID_LABEL

Object = Mapping[str, Any]

KINDS = ("TrainingRun", "JobSet", "Job", "Pod")
WRITES = ("create", "update", "patch", "delete")
ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Change:
    """An object as it was stored. `made`: there was none of it before; `gone`: with this it was removed."""

    version: int
    raw: Object
    made: bool
    gone: bool

    @property
    def kind(self) -> str:
        return str(self.raw["kind"])

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def namespace(self) -> str:
        return str(self.raw["metadata"]["namespace"])

    @property
    def labels(self) -> Mapping[str, str]:
        return self.raw["metadata"].get("labels") or {}

    @property
    def life(self) -> str:
        """Of a pod: its attempt, and which start of the attempt's JobSet."""
        return f"{self.labels.get(ATTEMPT_LABEL, '')}.{self.labels.get(RESTART_LABEL, '0')}"

    @property
    def run(self) -> str:
        """The run that it belongs to, for people."""
        name = self.raw["metadata"]["name"] if self.kind == "TrainingRun" else self.labels.get(RUN_LABEL)
        return f"{self.namespace}/{name}"


def changes(audit: Iterable[Object]) -> list[Change]:
    """The writes to runs and what belongs to them, oldest first. An object that has gone is told with the version before, or with
    none, and the log may name the write before that later: its end comes after all else that was written of it."""
    found: list[Change] = []
    last: dict[str, int] = {}
    for entry in audit:
        change = _change(entry, found[-1].version if found else 0)
        if change is not None:
            found.append(change)
            last[change.uid] = max(change.version, last.get(change.uid, 0))
    return sorted(found, key=lambda change: (last[change.uid] if change.gone else change.version, change.gone))


def _change(entry: Object, before: int) -> Change | None:
    """The write of an entry, if it is one; `before` is the version of the entry before, for an object that is told without its own."""
    raw = entry.get("responseObject") or {}
    metadata = raw.get("metadata") or {}
    tried = "dryRun=" in entry.get("requestURI", "")
    done = entry.get("verb") in WRITES and not tried and (entry.get("responseStatus") or {}).get("code", 500) < 300
    if not done or raw.get("kind") not in KINDS or "uid" not in metadata:
        return None
    if raw["kind"] != "TrainingRun" and RUN_LABEL not in (metadata.get("labels") or {}):
        return None
    doomed = "deletionTimestamp" in metadata or entry["verb"] == "delete"
    gone = doomed and not metadata.get("finalizers") and not metadata.get("deletionGracePeriodSeconds")
    return Change(int(metadata.get("resourceVersion") or before), raw, entry["verb"] == "create", gone)


def broken(history: Iterable[Change], quotas: Mapping[str, int] | None = None) -> list[str]:
    """Every invariant that was broken, in a sentence each. `quotas`: GPUs that the pods of a namespace may have at most."""
    ordered = list(history)
    checks = (_gangs(ordered), _children(ordered), _statuses(ordered), _gpus(ordered, quotas or {}))
    return [sentence for check in checks for sentence in check]


def _gangs(history: list[Change]) -> Iterator[str]:
    """At most one live gang a run: all its pods that have not ended are of one life of one attempt."""
    alive: dict[str, dict[str, Change]] = {}
    for change in history:
        if change.kind != "Pod":
            continue
        pods = alive.setdefault(change.labels.get(UID_LABEL, ""), {})
        if change.gone or (change.raw.get("status") or {}).get("phase") in ENDED:
            pods.pop(change.uid, None)
            continue
        pods[change.uid] = change
        lives = sorted({pod.life for pod in pods.values()})
        if len(lives) > 1:
            last = ", ".join(f"{pod.raw['metadata']['name']} last written at {pod.version}" for pod in pods.values())
            yield f"{change.run}: pods of {' and '.join(lives)} were alive together at version {change.version}: {last}"


def _children(history: list[Change]) -> Iterator[str]:
    """Each child was made for a run that was there, and there is never a second one of the same attempt. Where a run or its
    namespace is deleted in the background, controllers may still write to a child that is about to follow."""
    runs: set[str] = set()
    made: dict[tuple[str, str, str], str] = {}
    for change in history:
        if change.kind == "TrainingRun":
            (runs.discard if change.gone else runs.add)(change.uid)
        owner = next(iter(change.raw["metadata"].get("ownerReferences") or ()), {})
        if change.kind not in ("JobSet", "Job") or owner.get("kind") != "TrainingRun":
            continue
        attempt = (change.kind, change.labels.get(UID_LABEL, ""), change.labels.get(ATTEMPT_LABEL, ""))
        if made.setdefault(attempt, change.uid) != change.uid:
            yield f"{change.run}: a second {change.kind} of attempt {attempt[2]} was made at version {change.version}"
        if change.made and owner["uid"] not in runs:
            yield f"{change.run}: {change.kind} made for a run that is gone, at version {change.version}"


def _statuses(history: list[Change]) -> Iterator[str]:
    """An end is final and one of the two, and neither the attempt nor the checkpoint goes back."""
    last: dict[str, Object] = {}
    for change in history:
        if change.kind != "TrainingRun":
            continue
        new, old = change.raw.get("status") or {}, last.get(change.uid, {})
        last[change.uid] = new
        at = f"{change.run} at version {change.version}"
        true = {each["type"] for each in new.get("conditions") or () if each["status"] == "True"}
        if set(ENDED) <= true:
            yield f"{at}: Succeeded and Failed are both true"
        if old.get("phase") in ENDED and new.get("phase") != old["phase"]:
            yield f"{at}: {old['phase']} was left for {new.get('phase')}"
        for name, values in (
            ("attempt", [each.get("attempt", 0) for each in (old, new)]),
            ("checkpoint.step", [(each.get("checkpoint") or {}).get("step", 0) for each in (old, new)]),
        ):
            if values[1] < values[0]:
                yield f"{at}: {name} went back from {values[0]} to {values[1]}"


def _gpus(history: list[Change], quotas: Mapping[str, int]) -> Iterator[str]:
    """Pods that have a node never hold more GPUs than the quota."""
    held: dict[str, dict[str, int]] = {}
    for change in history:
        if change.kind != "Pod" or change.namespace not in quotas:
            continue
        pods = held.setdefault(change.namespace, {})
        pods.pop(change.uid, None)
        ended = change.gone or (change.raw.get("status") or {}).get("phase") in ENDED
        if change.raw["spec"].get("nodeName") and not ended:
            pods[change.uid] = sum(map(_requested, change.raw["spec"]["containers"]))
            if sum(pods.values()) > quotas[change.namespace]:
                yield f"{change.run}: {sum(pods.values())} GPUs were held, the quota is {quotas[change.namespace]}"


def _requested(container: Object) -> int:
    return int(((container.get("resources") or {}).get("requests") or {}).get("nvidia.com/gpu", 0))
