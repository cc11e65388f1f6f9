"""The life of runs on a real control plane with JobSet and Kueue; the pods' ends are told as a kubelet would tell them."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from atelier_api.exit_codes import MEANINGS, ExitCode
from cluster.daemons import ClusterError
from cluster_documents import queues, run_document
from operator_process import ClusterRun, OperatorProcess, until

pytest_plugins = ("cluster_fixtures", "cluster_cli")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]

Make = Callable[..., ClusterRun]


@pytest.fixture
def make(operator: OperatorProcess, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes runs in the test's own namespace."""
    cluster = operator.cluster
    namespace = f"t{abs(hash(request.node.nodeid)) % 10**8}"
    cluster.make_namespace(namespace)

    def run(name: str = "run", *, gpus: int | None = None, **spec: Any) -> ClusterRun:
        if gpus is not None:
            cluster.apply(queues(namespace, gpus))
        cluster.apply(json.dumps(run_document(namespace, name, **spec)))
        return ClusterRun(cluster, namespace, name)

    yield run
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def result(code: ExitCode, message: str = "", step: int = 3) -> str:
    """What an agent leaves as its termination message."""
    return json.dumps(
        {
            "exitCode": int(code),
            "reason": MEANINGS[code].reason,
            "message": message or MEANINGS[code].text,
            "attempt": "1.0",
            "time": time.time(),
            "step": step,
        }
    )


def both_pods(run: ClusterRun) -> list[dict[str, Any]]:
    return list(until(lambda: pods if len(pods := run.pods()) == 2 else None, "two pods"))


def end(run: ClusterRun, code: ExitCode, message: str = "") -> None:
    """Node 0 fails; its peer leaves as one that has lost it, after a while as a real one, if it is still there then."""
    first, second = both_pods(run)
    run.end_pod(first, int(code), result(code, message))
    time.sleep(1)
    with contextlib.suppress(ClusterError):
        run.end_pod(second, 82, result(ExitCode.COLLECTIVE_TIMEOUT))


def test_a_run_goes_from_pending_to_succeeded(make: Make) -> None:
    run = make()
    run.wait("Preparing", "Starting")
    for pod in both_pods(run):
        run.end_pod(pod, 0, result(ExitCode.DONE, step=10))
    status = run.wait("Succeeded")
    assert status["plan"]["backend"] == "jobset"
    assert status["attempt"] == 1
    assert run.condition("Succeeded")["status"] == "True"
    assert run.condition("Failed")["status"] == "False"
    assert status["observedGeneration"] == run.get()["metadata"]["generation"]


@pytest.mark.parametrize("code", [ExitCode.CONFIG, ExitCode.DATA, ExitCode.CREDENTIALS, ExitCode.DIVERGED])
def test_what_no_restart_cures_fails_the_run_at_once(make: Make, code: ExitCode) -> None:
    run = make()
    end(run, code, "because")
    status = run.wait("Failed", MEANINGS[code].reason)
    assert "because" in status["message"]
    assert status["restarts"]["counted"] == 0


def test_a_crash_restarts_the_gang_and_is_counted(make: Make) -> None:
    run = make()
    before = {pod["metadata"]["uid"] for pod in both_pods(run)}
    end(run, ExitCode.INTERNAL)
    run.wait("Recovering")
    until(lambda: len(run.pods()) == 2 and not before & {pod["metadata"]["uid"] for pod in run.pods()}, "new pods")
    status = until(lambda: s if (s := run.status())["restarts"]["counted"] == 1 else None, "the count")
    assert status["attempt"] == 1
    for pod in both_pods(run):
        run.end_pod(pod, 0, result(ExitCode.DONE))
    run.wait("Succeeded")


def test_a_stop_is_not_counted(make: Make) -> None:
    run = make(retry={"maxRestarts": 0})
    for pod in both_pods(run):
        run.end_pod(pod, 75, result(ExitCode.STOPPED))
    status = until(lambda: s if (s := run.status())["restarts"]["uncounted"] == 1 else None, "the count")
    assert status["restarts"]["counted"] == 0
    assert len(both_pods(run)) == 2


def test_restarts_are_used_up(make: Make) -> None:
    run = make(retry={"maxRestarts": 1})
    first = both_pods(run)
    run.end_pod(first[0], 70, result(ExitCode.INTERNAL))
    known = {pod["metadata"]["uid"] for pod in first}
    until(lambda: [pod for pod in run.pods() if pod["metadata"]["uid"] not in known], "the second life")
    run.end_pod(both_pods(run)[0], 70, result(ExitCode.INTERNAL, "again"))
    status = run.wait("Failed", "MaxRestarts")
    assert "spec.retry.maxRestarts" in status["message"]


def test_memory_that_ran_out_makes_another_plan(make: Make) -> None:
    run = make()
    end(run, ExitCode.OUT_OF_MEMORY)
    first = run.status()["plan"]
    status = until(lambda: s if (s := run.status())["attempt"] == 2 else None, "a second attempt")
    assert status["plan"]["predictedPeakMemoryBytes"] < first["predictedPeakMemoryBytes"]
    assert status["attempts"][0]["reason"] == "OutOfMemory"
    assert status["restarts"]["counted"] == 0


def test_a_gpu_fault_makes_an_attempt_elsewhere(make: Make) -> None:
    run = make()
    node = both_pods(run)[0]["spec"]["nodeName"]
    end(run, ExitCode.GPU_FAULT)
    until(lambda: run.status()["attempt"] == 2, "a second attempt")
    assert run.status()["excludedNodes"] == [node]
    assert node not in {pod["spec"]["nodeName"] for pod in both_pods(run)}


def test_suspend_stops_and_resume_goes_on(make: Make) -> None:
    run = make()
    both_pods(run)
    run.patch({"schedule": {"suspend": True}})
    run.wait("Suspended", "Requested")
    assert run.condition("Suspended")["status"] == "True"
    assert run.objects("jobset,job,pod") == []
    run.patch({"schedule": {"suspend": False}})
    both_pods(run)
    status = run.status()
    assert status["attempt"] == 2
    assert status["restarts"] == {"counted": 0, "uncounted": 0}


def test_a_deleted_child_is_made_again_and_counted_once(make: Make) -> None:
    run = make()
    both_pods(run)
    run.cluster.kubectl("delete", "jobset", "run-1", "-n", run.namespace)
    until(lambda: run.status().get("attempt") == 2, "a second attempt")
    assert run.status()["restarts"]["counted"] == 1
    assert len(both_pods(run)) == 2


def test_more_steps_than_were_asked_for_go_on_in_another_attempt(make: Make) -> None:
    run = make()
    pods = both_pods(run)
    run.patch({"hyperparameters": {"steps": 20}})
    for pod in pods:
        run.end_pod(pod, 0, result(ExitCode.DONE))
    until(lambda: run.status().get("attempt") == 2, "a second attempt")
    for pod in both_pods(run):
        run.end_pod(pod, 0, result(ExitCode.DONE))
    run.wait("Succeeded")


def test_deleting_a_run_deletes_everything(make: Make) -> None:
    run = make()
    both_pods(run)
    run.delete()
    until(lambda: run.objects() == [], "everything to go")


def test_a_run_that_was_ended_is_deleted_when_its_time_is_over(make: Make) -> None:
    run = make(schedule={"ttlSecondsAfterFinished": 1})
    for pod in both_pods(run):
        run.end_pod(pod, 0, result(ExitCode.DONE))
    until(lambda: run.cluster.kubectl("get", "trun", "-n", run.namespace, "-o", "name") == "", "the run to go")


def test_a_deadline_stops_the_run(make: Make) -> None:
    run = make(schedule={"activeDeadlineSeconds": 2})
    both_pods(run)
    run.wait("Failed", "DeadlineExceeded")
    until(lambda: run.objects("pod") == [], "the pods to go")


LARGE = {
    "model": {"family": "flux"},
    "adapter": {"type": "full"},
    "parallelism": {"nodes": 1},
    "hyperparameters": {"precision": "fp32"},
}
REFUSED = {
    "relative path": ({"storage": {"uri": "here"}}, "Accepted", "InvalidSpec", "spec.storage.uri"),
    "no profile": ({"profileRef": {"name": "other"}}, "Accepted", "ProfileNotFound", "ClusterTrainingProfile other"),
    "no such GPU": ({"parallelism": {"gpuClass": "h1000"}}, "Accepted", "InvalidSpec", "fake-80g"),
    "does not fit": (LARGE, "Fits", "DoesNotFit", "GiB"),
}


@pytest.mark.parametrize(("spec", "kind", "reason", "words"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_work_says_so_and_makes_nothing(
    make: Make, spec: dict[str, Any], kind: str, reason: str, words: str
) -> None:
    run = make(**spec)
    status = run.wait("Pending", reason)
    assert words in status["message"]
    assert run.condition(kind)["status"] == "False"
    assert run.objects() == []


# --- queues -----------------------------------------------------------------------------------------------------------


def test_the_second_run_waits_for_quota_and_starts_when_the_first_has_ended(make: Make) -> None:
    first = make("first", gpus=2, schedule={"queue": "gpu"})
    both_pods(first)
    second = make("second", schedule={"queue": "gpu"})
    status = second.wait("Queued", "WaitingForQuota")
    assert status["queue"]["position"] == 1
    assert second.pods() == []
    for pod in both_pods(first):
        first.end_pod(pod, 0, result(ExitCode.DONE))
    first.wait("Succeeded")
    assert len(both_pods(second)) == 2
    until(lambda: second.condition("Admitted")["status"] == "True", "the status to say so")


def test_a_run_larger_than_the_quota_says_so(make: Make) -> None:
    run = make(gpus=1, schedule={"queue": "gpu"})
    run.wait("Queued", "ExceedsMaxQuota")


def test_a_higher_priority_takes_the_quota_and_gives_it_back(make: Make) -> None:
    low = make("low", gpus=2, schedule={"queue": "gpu"})
    low.cluster.apply(
        {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "WorkloadPriorityClass",
            "metadata": {"name": "high"},
            "value": 1000,
        }
    )
    both_pods(low)
    high = make("high", schedule={"queue": "gpu", "priority": "high"})
    assert len(both_pods(high)) == 2
    low.wait("Suspended", "Preempted")
    for pod in both_pods(high):
        high.end_pod(pod, 0, result(ExitCode.DONE))
    high.wait("Succeeded")
    assert len(both_pods(low)) == 2
    assert low.status()["restarts"]["counted"] == 0


# --- the operator itself ----------------------------------------------------------------------------------------------


def test_the_operator_is_killed_and_back_after_the_run_has_ended(operator: OperatorProcess, make: Make) -> None:
    run = make()
    pods = both_pods(run)
    operator.kill()
    for pod in pods:
        run.end_pod(pod, 0, result(ExitCode.DONE))
    until(lambda: run.objects("jobset")[0]["status"].get("terminalState") == "Completed", "the JobSet to complete")
    operator.start()
    run.wait("Succeeded")
