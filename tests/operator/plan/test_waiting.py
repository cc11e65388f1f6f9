"""Why a child does not train yet: quota, nodes, images."""

from datetime import timedelta
from typing import Any

import pytest

from atelier_operator.observed import Workload
from run_stories import START, Story, pod, trained, workload


def queued(**facts: Any) -> Story:
    """A run that Kueue has taken in charge, with its Workload."""
    story = Story(kueue=True, schedule={"queue": "gpu"})
    story.look()
    story.workload = workload(**facts)
    story.waiting = (story.workload,)
    return story


EXCEEDS = (
    "couldn't assign flavors to pod set node: insufficient quota for nvidia.com/gpu in flavor default, "
    "request > maximum capacity (8 > 4)"
)
MORE = "couldn't assign flavors to pod set node: insufficient unused quota for nvidia.com/gpu in flavor default, 2 more needed"

WAITS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "nothing said yet": ({}, "Queued", "WaitingForQuota", "place 1 in queue gpu"),
    "others have it": ({"message": MORE}, "Queued", "WaitingForQuota", "2 more needed"),
    "larger than the queue": ({"message": EXCEEDS}, "Queued", "ExceedsMaxQuota", "(8 > 4)"),
    "no LocalQueue": ({"message": "LocalQueue gpu doesn't exist"}, "Queued", "NoQueue", "queue gpu cannot be used"),
    "no ClusterQueue": ({"message": "ClusterQueue all doesn't exist"}, "Queued", "NoQueue", "all doesn't exist"),
    "inactive": ({"message": "ClusterQueue all is inactive"}, "Queued", "NoQueue", "is inactive"),
    "stopped": ({"message": "LocalQueue gpu is stopped"}, "Queued", "NoQueue", "is stopped"),
    "reserved, not started": ({"reserved": True}, "Queued", "Pending", "the start is near"),
    "preempted": ({"evicted": "Preempted", "message": "by another"}, "Suspended", "Preempted", "(Preempted)"),
    "node failures": ({"evicted": "NodeFailures"}, "Suspended", "Preempted", "(NodeFailures)"),
}


@pytest.mark.parametrize(("facts", "phase", "reason", "words"), WAITS.values(), ids=WAITS)
def test_a_run_waits_for_quota_with_kueues_reason(facts: dict[str, Any], phase: str, reason: str, words: str) -> None:
    story = queued(**facts)
    decided = story.look(1)
    assert (story.status.phase, story.status.reason) == (phase, reason)
    assert words in story.status.message
    assert (story.condition("Admitted").status, story.condition("Admitted").reason) == ("False", reason)
    assert (story.condition("Suspended").status == "True") is (phase == "Suspended")
    assert (decided.create, decided.delete) == ((), ())


def test_kueue_has_not_looked_yet() -> None:
    story = queued()
    story.workload = None
    story.look(1)
    assert (story.status.phase, story.status.reason) == ("Queued", "Pending")


ORDER: dict[str, tuple[tuple[dict[str, Any], ...], int]] = {
    "alone": ((), 1),
    "an older one": (({"created": START - timedelta(hours=1)},), 2),
    "a younger one": (({"created": START + timedelta(hours=1)},), 1),
    "a higher priority": (({"created": START + timedelta(hours=1), "priority": 5},), 2),
    "both": (({"created": START - timedelta(hours=1)}, {"priority": 5}), 3),
}


@pytest.mark.parametrize(("others", "place"), ORDER.values(), ids=ORDER)
def test_the_place_in_the_queue_is_told(others: tuple[dict[str, Any], ...], place: int) -> None:
    story = queued()
    assert story.workload is not None
    facts = [{"name": f"other-{index}", **changed} for index, changed in enumerate(others)]
    story.waiting = (*(workload(**changed) for changed in facts), story.workload)
    story.look(1)
    queue = story.status.queue
    assert queue is not None
    assert (queue.name, queue.workload, queue.position) == ("gpu", "jobset-knight-1", place)
    assert f"place {place} in queue gpu" in story.status.message


def test_an_admitted_run_has_quota_and_no_place() -> None:
    story = queued(reserved=True, admitted=True, admitted_at="2026-11-01T12:00:05Z")
    story.run_pods()
    story.look(6)
    queue = story.status.queue
    assert queue is not None
    assert (queue.position, queue.admitted_at) == (None, "2026-11-01T12:00:05Z")
    assert (story.condition("Admitted").status, story.condition("Admitted").reason) == ("True", "QuotaReserved")
    assert story.status.phase == "Preparing"


def test_a_preempted_run_trains_again_without_a_charge() -> None:
    story = queued(reserved=True, admitted=True)
    story.train()
    story.look(5)
    story.workload = workload(evicted="Preempted", message="Preempted to accommodate a workload")
    story.change(suspended=True)
    story.pods, story.progress = (), None
    story.look(5)
    assert (story.status.phase, story.condition("Suspended").reason) == ("Suspended", "Preempted")
    story.workload = workload(reserved=True, admitted=True)
    story.train(20)
    story.look(60)
    assert (story.status.phase, story.condition("Suspended").status) == ("Running", "False")
    assert (story.status.attempt, story.status.restarts.counted) == (1, 0)


def test_a_later_attempt_that_waits_in_the_queue_is_queued_not_preempted() -> None:
    story = queued(reserved=True, admitted=True)
    story.train()
    story.look(5)
    story.edit("schedule", suspend=True)
    story.look(5)
    story.vanish()
    story.edit("schedule", suspend=False)
    story.look(5)
    story.workload = workload("uid-knight-2")
    story.look(5)
    assert (story.status.attempt, story.status.phase, story.status.reason) == (2, "Queued", "WaitingForQuota")


PODS: dict[str, tuple[tuple[Any, ...], str, str, str]] = {
    "none yet": ((), "False", "GangPending", "0 of 2 pods have a node"),
    "one of two": ((pod(0), pod(1, node=None, running=False)), "False", "GangPending", "1 of 2 pods"),
    "no room": (
        (
            pod(0),
            pod(1, node=None, running=False, unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        ),
        "False",
        "Unschedulable",
        "1 of 2 pods have a node: 0/3 nodes are available",
    ),
    "an image": (
        (pod(0), pod(1, running=False, waiting="ImagePullBackOff", waiting_message="manifest unknown")),
        "False",
        "ImagePull",
        "pod knight-1-node-0-1: ImagePullBackOff: manifest unknown",
    ),
    "a Secret": (
        (pod(0), pod(1, running=False, waiting="CreateContainerConfigError", waiting_message='secret "hf" not found')),
        "False",
        "ContainerNotCreated",
        'secret "hf" not found',
    ),
    "starting": ((pod(0), pod(1, running=False, waiting="ContainerCreating")), "True", "Bound", "2 of 2 pods"),
    "all": ((pod(0), pod(1)), "True", "Bound", "2 of 2 pods"),
}


@pytest.mark.parametrize(("pods", "verdict", "reason", "words"), PODS.values(), ids=PODS)
def test_a_gang_is_scheduled_when_all_pods_have_node_and_image(
    pods: tuple[Any, ...], verdict: str, reason: str, words: str
) -> None:
    story = Story()
    story.look()
    story.pods = pods
    story.look(5)
    scheduled = story.condition("Scheduled")
    assert (scheduled.status, scheduled.reason) == (verdict, reason)
    assert words in scheduled.message
    assert words in story.status.message
    assert story.status.phase == "Preparing"
    assert (story.status.start_time is not None) is (pods == PODS["all"][0])


def test_a_restarted_gang_says_what_it_waits_for() -> None:
    story = trained()
    story.change(restarts=1, restarts_counted=1)
    story.pods, story.progress = (pod(0, restart=1), pod(1, restart=1, node=None, running=False)), None
    story.look(5)
    assert (story.status.phase, story.status.reason) == ("Recovering", "GangPending")
    assert story.status.message == "1 of 2 pods have a node"


def test_a_workload_is_read_from_kueues_conditions() -> None:
    def said(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, str]:
        return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": "then"}

    raw = {
        "metadata": {"name": "w", "ownerReferences": [{"uid": "u"}], "creationTimestamp": "2026-11-01T12:00:00Z"},
        "spec": {"queueName": "gpu", "priority": 3},
        "status": {
            "conditions": [said("QuotaReserved", "False", "Pending", "no room"), said("Evicted", "True", "Preempted")]
        },
    }
    assert Workload.of(raw) == workload("u", name="w", priority=3, message="no room", evicted="Preempted")
    raw["status"] = {
        "conditions": [said("QuotaReserved", "True"), said("Admitted", "True"), said("Evicted", "False", "x")]
    }
    admitted = Workload.of(raw)
    assert (admitted.reserved, admitted.admitted, admitted.admitted_at, admitted.evicted) == (True, True, "then", "")
