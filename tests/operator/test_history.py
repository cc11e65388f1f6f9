"""The checker of a cluster's history finds each thing that must not have been."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from invariants import broken, changes
from operator_process import left_behind

Object = dict[str, Any]


class History:
    """An audit log, written line by line."""

    def __init__(self) -> None:
        self.entries: list[Object] = []
        self._versions = itertools.count(1)

    def write(self, kind: str, name: str, verb: str = "update", code: int = 200, **parts: Any) -> "History":
        labels = {"atelier.dev/run": "knight", "atelier.dev/run-uid": "run", "atelier.dev/attempt": "1"}
        metadata = {"name": name, "namespace": "art", "uid": name, "labels": labels} | parts.pop("metadata", {})
        metadata["resourceVersion"] = str(next(self._versions))
        raw = {"kind": kind, "metadata": metadata, **parts}
        self.entries.append({"verb": verb, "responseStatus": {"code": code}, "responseObject": raw})
        return self

    def run(self, **status: Any) -> "History":
        return self.write("TrainingRun", "run", status=status)

    def child(self, name: str = "knight-1", kind: str = "JobSet", verb: str = "create", **metadata: Any) -> "History":
        owner = {"ownerReferences": [{"kind": "TrainingRun", "uid": "run"}]}
        return self.write(kind, name, verb, metadata=owner | metadata)

    def pod(self, name: str, phase: str = "Running", attempt: str = "1", gpus: int = 1, **metadata: Any) -> "History":
        labels = {"atelier.dev/run": "knight", "atelier.dev/run-uid": "run", "atelier.dev/attempt": attempt}
        container = {"resources": {"requests": {"nvidia.com/gpu": str(gpus)}}}
        spec = {"nodeName": "gpu-0", "containers": [container]}
        return self.write("Pod", name, metadata={"labels": labels} | metadata, spec=spec, status={"phase": phase})

    def broken(self, **quotas: int) -> list[str]:
        return broken(changes(self.entries), quotas)


def test_a_life_that_is_in_order() -> None:
    history = History().run(phase="Queued", attempt=1).child().pod("a").pod("b")
    history.run(phase="Running", attempt=1, checkpoint={"step": 5})
    history.pod("a", "Failed").pod("b", "Running", deletionTimestamp="now", deletionGracePeriodSeconds=30)
    history.pod("b", "Running", deletionTimestamp="now", deletionGracePeriodSeconds=0, finalizers=["job"])
    history.pod("b", "Failed", deletionTimestamp="now", deletionGracePeriodSeconds=0)
    history.child(
        "knight-2", labels={"atelier.dev/run-uid": "run", "atelier.dev/run": "knight", "atelier.dev/attempt": "2"}
    )
    history.pod("c", attempt="2").pod("d", attempt="2").pod("c", "Succeeded", "2").pod("d", "Succeeded", "2")
    history.run(phase="Succeeded", attempt=2, checkpoint={"step": 9})
    assert history.broken(art=2) == []


BROKEN: dict[str, tuple[History, str]] = {
    "two gangs": (History().pod("a").pod("b", attempt="2"), "pods of 1.0 and 2.0 were alive together"),
    "two gangs while the first is being deleted": (
        History().pod("a", deletionTimestamp="now", deletionGracePeriodSeconds=30).pod("b", attempt="2"),
        "pods of 1.0 and 2.0",
    ),
    "two lives of one attempt": (
        History()
        .pod("a")
        .pod(
            "b",
            labels={
                "atelier.dev/run": "k",
                "atelier.dev/run-uid": "run",
                "atelier.dev/attempt": "1",
                "jobset.sigs.k8s.io/restart-attempt": "1",
            },
        ),
        "pods of 1.0 and 1.1",
    ),
    "a second child": (History().run().child().child(uid="other"), "a second JobSet of attempt 1"),
    "a child without a run": (History().child(), "JobSet made for a run that is gone"),
    "a child of a run that is gone": (
        History().run().write("TrainingRun", "run", "delete", metadata={"deletionTimestamp": "now"}).child(),
        "JobSet made for a run that is gone",
    ),
    "both ends": (
        History().run(conditions=[{"type": each, "status": "True"} for each in ("Succeeded", "Failed")]),
        "Succeeded and Failed are both true",
    ),
    "an end that is left": (History().run(phase="Failed").run(phase="Running"), "Failed was left for Running"),
    "an attempt that goes back": (History().run(attempt=2).run(attempt=1), "attempt went back from 2 to 1"),
    "a checkpoint that goes back": (
        History().run(checkpoint={"step": 9}).run(checkpoint={"step": 4}),
        "checkpoint.step went back from 9 to 4",
    ),
    "more GPUs than the quota": (History().pod("a", gpus=2).pod("b"), "3 GPUs were held, the quota is 2"),
}


@pytest.mark.parametrize(("history", "sentence"), BROKEN.values(), ids=BROKEN)
def test_what_must_not_be_is_found(history: History, sentence: str) -> None:
    (found,) = history.broken(art=2)
    assert sentence in found


def test_a_child_outlives_a_run_that_is_deleted_in_the_background() -> None:
    history = History().run().child().write("TrainingRun", "run", "delete", metadata={"deletionTimestamp": "now"})
    assert history.child(verb="update").broken() == []


@dataclass
class Listed:
    """A cluster as it is listed: jobsets of runs, by the uid of their run; and the uids of runs."""

    children: list[Object]
    runs: list[str]

    @property
    def api(self) -> "Listed":
        return self

    def items(self, plural: str) -> list[Object]:
        found = {"jobsets": self.children, "trainingruns": [{"metadata": {"uid": uid}} for uid in self.runs]}
        return found.get(plural, [])


def test_a_child_that_nobody_deletes_after_its_run_is_found() -> None:
    def child(name: str, uid: str, kind: str = "TrainingRun", **metadata: Any) -> Object:
        return {"metadata": {"name": name, "ownerReferences": [{"kind": kind, "uid": uid}], **metadata}}

    children = [child("alive", "a"), child("left", "gone"), child("going", "gone", deletionTimestamp="now")]
    cluster: Any = Listed([*children, child("of another", "gone", "CronJob")], ["a"])
    assert left_behind(cluster) == ["left"]


def test_only_what_was_stored_counts() -> None:
    history = History().pod("a").pod("b", attempt="2")
    for entry, change in zip(history.entries, ({}, {"verb": "get"}), strict=True):
        entry.update(change)
    assert history.broken() == []
    history = History().pod("a").write("Pod", "b", code=409)
    assert history.broken() == []
    assert (
        changes(
            [{"verb": "create", "responseStatus": {"code": 201}, "responseObject": {"kind": "Status", "metadata": {}}}]
        )
        == []
    )


def test_the_order_is_that_of_the_store_and_not_of_the_log() -> None:
    history = History().pod("a").pod("a", "Succeeded").pod("b", attempt="2")
    history.entries.reverse()
    assert history.broken() == []


def test_an_object_that_has_gone_is_not_there_again_when_the_write_before_is_told_after_it() -> None:
    """A patch that takes the last finalizer away is answered with the version that was stored before."""
    history = History().pod("a").pod("a", deletionTimestamp="now", finalizers=["job"])
    history.pod("a", deletionTimestamp="now", deletionGracePeriodSeconds=0).pod("b", attempt="2")
    doomed, gone = history.entries[1:3]
    gone["responseObject"]["metadata"]["resourceVersion"] = doomed["responseObject"]["metadata"]["resourceVersion"]
    history.entries[1:3] = [gone, doomed]
    assert history.broken() == []
