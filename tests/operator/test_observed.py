"""What is read from the API's objects: pods, children, the pods of the newest life."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from atelier_api.exit_codes import ExitCode
from atelier_api.result import AgentResult
from atelier_operator.desired import job, jobset
from atelier_operator.observed import Apis, Child, Observed, Pod, Workload, is_lost, only_what_is_read
from orders import order
from run_stories import START, pod

Object = dict[str, Any]

RESULT = AgentResult(exit_code=ExitCode.DATA, reason="DataError", message="no pictures", attempt="1.0", time=1.0)


def raw_pod(*states: Object, **status: Any) -> Object:
    """A pod of a JobSet; `states` are those of its containers, the trainer's last."""
    names = ["sidecar", "trainer"][-len(states) :] if states else []
    statuses = [{"name": name, "state": state} for name, state in zip(names, states, strict=True)]
    return {
        "metadata": {
            "name": "knight-1-node-0-1-x",
            "uid": "u",
            "labels": {"atelier.dev/attempt": "1", "jobset.sigs.k8s.io/restart-attempt": "2"},
            "annotations": {"batch.kubernetes.io/job-completion-index": "1"},
        },
        "spec": {"nodeName": "gpu-1"},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": statuses, **status},
    }


RUNNING = {"running": {"startedAt": "2026-11-01T12:00:00Z"}}
ENDED = {
    "terminated": {
        "exitCode": 65,
        "reason": "Error",
        "finishedAt": "2026-11-01T12:00:00Z",
        "message": RESULT.model_dump_json(by_alias=True),
    }
}
WAITING = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}


def test_a_running_pod() -> None:
    found = Pod.of(raw_pod(RUNNING))
    assert (found.attempt, found.restart, found.index, found.node, found.ip) == (1, 2, 1, "gpu-1", "10.0.0.1")
    assert (found.running, found.exit_code, found.failed, found.ended) == (True, None, False, False)


WORKLOAD = {
    "metadata": {"name": "w", "uid": "w", "namespace": "art", "ownerReferences": [{"uid": "u"}]},
    "spec": {"queueName": "gpu", "priority": 7, "podSets": [{"template": {}}]},
    "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "full"}]},
}
KEPT: dict[str, tuple[str, Any, Object]] = {
    "a pod": ("Pod", Pod.of, raw_pod(RUNNING)),
    "a JobSet": (
        "JobSet",
        lambda raw: Child.of(raw, "jobset"),
        {**jobset(order(queue="gpu")), "status": {"restarts": 2}},
    ),
    "a Job": ("Job", lambda raw: Child.of(raw, "job"), job(order(backend="job"))),
    "a Workload": ("Workload", Workload.of, WORKLOAD),
}


@pytest.mark.parametrize(("kind", "read", "raw"), KEPT.values(), ids=KEPT)
def test_what_is_kept_of_an_object_is_all_that_is_read(kind: str, read: Any, raw: Object) -> None:
    """And less than it was: a thousand runs have their pods, Jobs and JobSets in memory."""
    raw = copy.deepcopy(raw)
    raw["metadata"] |= {"uid": "u", "managedFields": [{"manager": "somebody"}]}
    raw["spec"] |= {"suspend": True, "template": {"spec": {}}}
    kept = only_what_is_read(kind, raw)
    assert read(kept) == read(raw)
    assert "managedFields" not in kept["metadata"]
    assert "template" not in kept["spec"]
    assert "template" in raw["spec"]


def test_an_ended_pod_with_the_facts_of_its_agent() -> None:
    found = Pod.of(raw_pod(ENDED, phase="Failed"))
    assert (found.running, found.exit_code, found.exit_reason, found.finished) == (False, 65, "Error", START)
    assert (found.result, found.failed, found.ended) == (RESULT, True, True)


@pytest.mark.parametrize("message", ["", "no JSON", '{"exitCode": 1}', None])
def test_what_is_no_result_of_an_agent_is_none(message: str | None) -> None:
    state = {"terminated": {"exitCode": 1, "message": message}}
    assert Pod.of(raw_pod(state)).result is None


def test_a_container_that_others_put_in_does_not_speak_for_the_trainer() -> None:
    found = Pod.of(raw_pod(ENDED, RUNNING))
    assert (found.running, found.exit_code, found.result) == (True, None, None)


def test_a_pod_says_why_it_waits() -> None:
    assert (Pod.of(raw_pod(WAITING)).waiting, Pod.of(raw_pod(WAITING)).waiting_message) == (
        "ImagePullBackOff",
        "no such image",
    )
    pending = raw_pod(
        conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPUs"}]
    )
    assert Pod.of(pending).unschedulable == "no GPUs"


def test_an_evicted_pod_that_never_ran_has_failed() -> None:
    conditions = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
    found = Pod.of(raw_pod(phase="Failed", reason="Evicted", message="low on memory", conditions=conditions))
    assert (found.disrupted, found.failed, found.ended, found.failure) == (True, True, True, "low on memory")


def test_a_pod_of_which_nothing_is_known_is_pending() -> None:
    found = Pod.of({"metadata": {"name": "a", "uid": "u"}})
    assert (found.phase, found.attempt, found.node, found.failed, found.ended) == ("Pending", 0, None, False, False)


def made(manifest: Object, **status: Any) -> Object:
    manifest["metadata"] |= {"uid": "u", "creationTimestamp": "2026-11-01T12:00:00Z"}
    return manifest | {"status": status}


def test_a_child_is_read_back_from_what_was_made() -> None:
    of = order(queue="gpu", attempt=2)
    found = Child.of(made(jobset(of)), "jobset")
    assert (found.name, found.attempt, found.queue, found.steps, found.plan) == (
        "knight-2",
        2,
        "gpu",
        100,
        of.run_file.plan,
    )
    assert (found.finished, found.suspended, found.deleting, found.created) == (None, False, False, START)


ENDS = {
    "a completed JobSet": ("Completed", "True", "Completed"),
    "a complete Job": ("Complete", "True", "Completed"),
    "a failed one": ("Failed", "True", "Failed"),
    "one that fails": ("FailureTarget", "True", None),
    "one that has not failed": ("Failed", "False", None),
}


@pytest.mark.parametrize(("kind", "status", "finished"), ENDS.values(), ids=ENDS)
def test_a_child_has_ended_by_its_conditions(kind: str, status: str, finished: str | None) -> None:
    condition = {
        "type": kind,
        "status": status,
        "reason": "R",
        "message": "M",
        "lastTransitionTime": "2026-11-01T12:00:00Z",
    }
    found = Child.of(made(job(order(backend="job")), conditions=[condition]), "job")
    assert found.finished == finished
    assert (found.reason, found.message, found.finished_at) == (("R", "M", START) if finished else ("", "", None))


def test_the_restarts_of_a_jobset_are_its_own_count() -> None:
    found = Child.of(made(jobset(order()), restarts=3, restartsCountTowardsMax=1), "jobset")
    assert (found.restarts, found.restarts_counted) == (3, 1)


def test_a_plan_that_cannot_be_read_is_none() -> None:
    manifest = made(jobset(order()))
    manifest["metadata"]["annotations"]["atelier.dev/plan"] = '{"newer": 1}'
    assert Child.of(manifest, "jobset").plan is None


def test_the_pods_of_an_attempt_are_those_of_its_newest_life_in_order() -> None:
    pods = (pod(1, restart=1), pod(0, restart=1), pod(0), pod(1), pod(0, attempt=2, restart=5))
    seen = Observed(Apis(), None, pods=pods)
    assert [(each.index, each.restart) for each in seen.pods_of(1)] == [(0, 1), (1, 1)]
    assert seen.pods_of(3) == ()


def test_a_child_without_the_label_of_an_attempt_is_nobodys() -> None:
    child = replace(Child.of(made(jobset(order())), "jobset"), attempt=0)
    assert Observed(Apis(), None, children=(child,)).child(0) is None


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"deletionTimestamp": "2026-11-01T12:00:00Z", "deletionGracePeriodSeconds": 30}, START),
        ({"deletionTimestamp": "2026-11-01T12:00:00Z", "deletionGracePeriodSeconds": 0}, None),
    ],
    ids=["stays", "is to go", "was removed by force"],
)
def test_a_pod_that_is_to_go_says_by_when(metadata: Object, expected: Any) -> None:
    raw = raw_pod(RUNNING)
    raw["metadata"] |= metadata
    assert Pod.of(raw).gone_by == expected


@pytest.mark.parametrize(
    ("ready", "taint", "expected"),
    [
        ("Unknown", "node.kubernetes.io/unreachable", True),
        ("False", "node.kubernetes.io/unreachable", True),
        ("True", "node.kubernetes.io/unreachable", False),
        ("False", "node.kubernetes.io/not-ready", False),
        ("Unknown", "example.org/mine", False),
    ],
)
def test_a_node_is_lost_when_the_cluster_has_given_it_up(ready: str, taint: str, expected: bool) -> None:
    node = {"spec": {"taints": [{"key": taint}]}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}
    assert is_lost(node) == expected
    assert not is_lost({})
