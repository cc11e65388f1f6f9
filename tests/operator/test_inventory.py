"""What the watches bring, in whatever order, is found by the run it belongs to."""

from typing import Any

import pytest

from atelier_operator.inventory import Inventory
from run_stories import UID

Object = dict[str, Any]
KEY = ("art", "knight")


def thing(name: str, version: int = 1, *, uid: str | None = None, labels: Object | None = None, **parts: Any) -> Object:
    metadata = {"name": name, "namespace": "art", "uid": uid or f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": metadata | ({"labels": labels} if labels else {}), **parts}


def owned(
    name: str, owner: str = UID, *, version: int = 1, queue: str | None = None, uid: str = UID, **parts: Any
) -> Object:
    """An object with the labels of the run and an owner."""
    labels = {"atelier.dev/run": "knight", "atelier.dev/run-uid": uid}
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = queue
    made = thing(name, version, labels=labels, **parts)
    made["metadata"]["ownerReferences"] = [{"uid": owner, "controller": True}]
    return made


def workload(name: str, child: str, *conditions: str, version: int = 1, queue: str = "gpu") -> Object:
    made = thing(name, version, spec={"queueName": queue})
    made["metadata"]["ownerReferences"] = [{"uid": child, "controller": True}]
    made["status"] = {"conditions": [{"type": each, "status": "True"} for each in conditions]}
    return made


def names(found: list[Any]) -> list[str]:
    return sorted(raw["metadata"]["name"] for raw in found)


def test_a_run_is_found_by_its_name() -> None:
    inventory = Inventory()
    assert inventory.put("TrainingRun", thing("knight")) == KEY
    assert inventory.run(KEY) == thing("knight")
    assert inventory.runs() == [KEY]
    assert inventory.remove("TrainingRun", thing("knight")) == KEY
    assert (inventory.run(KEY), inventory.runs()) == (None, [])


def test_an_older_state_does_not_replace_a_newer_one() -> None:
    """The operator puts in the answer to its own write; the watch may bring what was before."""
    inventory = Inventory()
    inventory.put("TrainingRun", thing("knight", 10, status="new"))
    assert inventory.put("TrainingRun", thing("knight", 9, status="old")) is None
    assert inventory.put("TrainingRun", thing("knight", 10, status="same")) == KEY
    found = inventory.run(KEY)
    assert found is not None
    assert found["status"] == "same"


def test_an_object_that_was_made_anew_under_the_same_name_stays_whatever_comes_late_of_the_old_one() -> None:
    inventory = Inventory()
    inventory.put("TrainingRun", thing("knight", 5, uid="old"))
    assert inventory.put("TrainingRun", thing("knight", 9, uid="new")) == KEY
    assert inventory.put("TrainingRun", thing("knight", 7, uid="old")) is None
    assert inventory.remove("TrainingRun", thing("knight", 8, uid="old")) is None
    found = inventory.run(KEY)
    assert found is not None
    assert found["metadata"]["uid"] == "new"


def test_children_are_those_that_the_run_owns_itself() -> None:
    """A JobSet's Jobs carry the run's labels as well, and an older run of the name may have left some."""
    inventory = Inventory()
    assert inventory.put("Job", owned("knight-1")) == KEY
    inventory.put("Job", owned("knight-1-node-0", owner="uid-of-the-jobset"))
    inventory.put("Job", owned("knight-7", owner="older", uid="older"))
    assert names(inventory.children("Job", KEY, UID)) == ["knight-1"]
    assert inventory.children("JobSet", KEY, UID) == []


def test_pods_are_found_and_forgotten() -> None:
    inventory = Inventory()
    inventory.put("Pod", owned("a"))
    inventory.put("Pod", owned("b", version=3))
    inventory.put("Pod", owned("b", version=4))
    assert names(inventory.pods(KEY, UID)) == ["a", "b"]
    assert inventory.remove("Pod", owned("b")) == KEY
    assert inventory.remove("Pod", owned("b")) is None
    assert names(inventory.pods(KEY, UID)) == ["a"]


def test_an_object_without_our_label_concerns_no_run() -> None:
    inventory = Inventory()
    assert inventory.put("Pod", thing("other")) is None
    assert inventory.pods(KEY, UID) == []


@pytest.mark.parametrize("first", ["child", "workload"])
def test_a_workload_is_found_by_its_child_whichever_comes_first(first: str) -> None:
    inventory = Inventory()
    steps = [("JobSet", owned("knight-1", queue="gpu")), ("Workload", workload("w", "uid-knight-1"))]
    for kind, raw in steps if first == "child" else reversed(steps):
        inventory.put(kind, raw)
    assert inventory.workload("uid-knight-1") == steps[1][1]
    assert inventory.put("Workload", workload("w", "uid-knight-1", version=2)) == KEY, "it wakes the run of its child"


WAITING = {"nothing said": ((), True), "reserved": (("QuotaReserved",), False), "finished": (("Finished",), False)}


@pytest.mark.parametrize(("conditions", "waits"), WAITING.values(), ids=WAITING)
def test_workloads_without_quota_wait_in_their_queue(conditions: tuple[str, ...], waits: bool) -> None:
    inventory = Inventory()
    inventory.put("Workload", workload("w", "uid-1"))
    inventory.put("Workload", workload("other", "uid-2", queue="cpu"))
    inventory.put("Workload", workload("w", "uid-1", *conditions, version=2))
    assert names(inventory.waiting("art", "gpu")) == (["w"] if waits else [])
    inventory.remove("Workload", workload("w", "uid-1"))
    assert inventory.waiting("art", "gpu") == []
    assert inventory.workload("uid-1") is None


def test_a_workload_that_was_made_anew_outlives_the_old_one() -> None:
    inventory = Inventory()
    inventory.put("Workload", workload("old", "uid-1"))
    inventory.put("Workload", workload("new", "uid-1"))
    inventory.remove("Workload", workload("old", "uid-1"))
    assert inventory.workload("uid-1") == workload("new", "uid-1")


def test_profiles_are_found_by_scope_and_wake_their_runs() -> None:
    inventory = Inventory()
    cluster = {"metadata": {"name": "default", "uid": "c", "resourceVersion": "1"}}
    inventory.put("ClusterTrainingProfile", cluster)
    inventory.put("TrainingProfile", thing("default"))
    assert inventory.profile("ClusterTrainingProfile", "art", "default") == cluster
    assert inventory.profile("TrainingProfile", "art", "default") == thing("default")
    assert inventory.profile("TrainingProfile", "lab", "default") is None

    def naming(kind: str) -> Object:
        return {"profileRef": {"kind": kind, "name": "default"}}

    inventory.put("TrainingRun", thing("far", spec=naming("ClusterTrainingProfile")))
    inventory.put("TrainingRun", thing("near", spec=naming("TrainingProfile")))
    assert list(inventory.using_profile("ClusterTrainingProfile", "", "default")) == [("art", "far")]
    assert list(inventory.using_profile("TrainingProfile", "art", "default")) == [("art", "near")]
    assert list(inventory.using_profile("TrainingProfile", "lab", "default")) == []
