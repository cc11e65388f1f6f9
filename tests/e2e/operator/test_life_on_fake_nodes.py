"""The life of runs on real control planes: with JobSet and Kueue, without Kueue, and without both.

What is the same with Kueue as without, because the run has no queue, is not tried with it again.
The pods' ends are told as a kubelet would tell them. The operator has the rights of the chart's service account: a test fails
when one of its calls was denied.
"""

from typing import Any

import pytest

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_operator.names import rendezvous
from chart_release import ACCOUNT, Rights
from cluster.api import place
from cluster_kinds import FULL, NEITHER, NO_KUEUE, Engines, Make, Values, as_the_chart_allows, on
from fake_pods import both_pods, end, end_well, result
from operator_process import ClusterRun, OperatorProcess, until
from told_together import together

pytest_plugins = ("cluster_fixtures", "cluster_kinds", "told_together")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400), as_the_chart_allows]


@pytest.fixture(scope="module")
def operator_values() -> Values:
    """One test sits the Lease out."""
    return {"leaseSeconds": 9}


@on(NO_KUEUE, NEITHER, FULL)
@together
def test_a_run_goes_from_pending_to_succeeded(make: Make, engines: Engines) -> None:
    run = make()
    run.wait("Preparing", "Starting")
    end_well(run)
    status = run.wait("Succeeded")
    assert status["plan"]["backend"] == engines.backend
    assert status["attempt"] == 1
    assert run.condition("Succeeded")["status"] == "True"
    assert run.condition("Failed")["status"] == "False"
    assert status["observedGeneration"] == run.get()["metadata"]["generation"]


@on(NO_KUEUE, NEITHER)
@together
def test_what_no_restart_cures_fails_the_run_at_once(make: Make) -> None:
    codes = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.CREDENTIALS, ExitCode.DIVERGED)
    runs = {code: make(MEANINGS[code].reason.lower()) for code in codes}
    for code, run in runs.items():
        end(run, code, "because")
    for code, run in runs.items():
        status = run.wait("Failed", MEANINGS[code].reason)
        assert "because" in status["message"]
        assert status["restarts"]["counted"] == 0


@on(NO_KUEUE, NEITHER)
@together
def test_a_crash_restarts_the_gang_and_is_counted(make: Make, engines: Engines) -> None:
    """A JobSet starts the gang again itself; of a Job the operator makes another one."""
    run = make()
    before = {pod["metadata"]["uid"] for pod in both_pods(run)}
    end(run, ExitCode.INTERNAL)
    until(lambda: len(run.pods()) == 2 and not before & {pod["metadata"]["uid"] for pod in run.pods()}, "new pods")
    status = until(lambda: s if (s := run.status())["restarts"]["counted"] == 1 else None, "the count")
    assert status["attempt"] == (1 if engines.jobset else 2)
    end_well(run)
    run.wait("Succeeded")
    assert run.status()["restarts"] == {**status["restarts"], "counted": 1, "uncounted": 0}


@on(NO_KUEUE, NEITHER)
@together
def test_a_stop_is_not_counted(make: Make) -> None:
    run = make(retry={"maxRestarts": 0})
    before = {pod["metadata"]["uid"] for pod in both_pods(run)}
    for pod in both_pods(run):
        run.end_pod(pod, 75, result(ExitCode.STOPPED))
    status = until(lambda: s if (s := run.status())["restarts"]["uncounted"] == 1 else None, "the count")
    assert status["restarts"]["counted"] == 0
    until(lambda: len(run.pods()) == 2 and not before & {pod["metadata"]["uid"] for pod in run.pods()}, "new pods")


@on(NO_KUEUE, NEITHER)
@together
def test_restarts_are_used_up(make: Make) -> None:
    run = make(retry={"maxRestarts": 1})
    first = both_pods(run)
    run.end_pod(first[0], 70, result(ExitCode.INTERNAL))
    known = {pod["metadata"]["uid"] for pod in first}
    until(lambda: [pod for pod in run.pods() if pod["metadata"]["uid"] not in known], "the second life")
    run.end_pod(both_pods(run)[0], 70, result(ExitCode.INTERNAL, "again"))
    status = run.wait("Failed", "MaxRestarts")
    assert "spec.retry.maxRestarts" in status["message"]


@on(NO_KUEUE, NEITHER)
@together
def test_memory_that_ran_out_makes_another_plan(make: Make) -> None:
    run = make()
    end(run, ExitCode.OUT_OF_MEMORY)
    first = run.status()["plan"]
    status = until(lambda: s if (s := run.status())["attempt"] == 2 else None, "a second attempt")
    assert status["plan"]["predictedPeakMemoryBytes"] < first["predictedPeakMemoryBytes"]
    assert status["attempts"][0]["reason"] == "OutOfMemory"
    assert status["restarts"]["counted"] == 0


@on(NO_KUEUE, NEITHER)
@together
def test_a_gpu_fault_makes_an_attempt_elsewhere(make: Make) -> None:
    run = make()
    node = both_pods(run)[0]["spec"]["nodeName"]
    end(run, ExitCode.GPU_FAULT)
    until(lambda: run.status()["attempt"] == 2, "a second attempt")
    assert run.status()["excludedNodes"] == [node]
    assert node not in {pod["spec"]["nodeName"] for pod in both_pods(run)}


@on(NO_KUEUE, NEITHER)
@together
def test_suspend_stops_and_resume_goes_on(make: Make) -> None:
    run = make()
    both_pods(run)
    run.patch({"schedule": {"suspend": True}})
    run.wait("Suspended", "Requested")
    assert run.condition("Suspended")["status"] == "True"
    assert run.objects("jobsets", "jobs", "pods") == []
    run.patch({"schedule": {"suspend": False}})
    both_pods(run)
    status = until(lambda: s if (s := run.status())["attempt"] == 2 else None, "a second attempt")
    assert status["restarts"] == {"counted": 0, "uncounted": 0}


@on(NO_KUEUE, NEITHER)
@together
def test_a_deleted_child_is_made_again_and_counted_once(make: Make, engines: Engines) -> None:
    run = make()
    both_pods(run)
    run.cluster.kubectl("delete", engines.child, "run-1", "-n", run.namespace)
    until(lambda: run.status().get("attempt") == 2, "a second attempt")
    assert run.status()["restarts"]["counted"] == 1
    assert len(both_pods(run)) == 2


@on(NO_KUEUE, NEITHER)
@together
def test_more_steps_than_were_asked_for_go_on_in_another_attempt(make: Make) -> None:
    run = make()
    pods = both_pods(run)
    run.patch({"hyperparameters": {"steps": 20}})
    for pod in pods:
        run.end_pod(pod, 0, result(ExitCode.DONE))
    until(lambda: run.status().get("attempt") == 2, "a second attempt")
    end_well(run)
    run.wait("Succeeded")


@on(NO_KUEUE, NEITHER)
@together
def test_deleting_a_run_deletes_everything(make: Make) -> None:
    run = make()
    both_pods(run)
    run.delete()
    until(lambda: run.objects() == [], "everything to go")


@on(NO_KUEUE, NEITHER)
@together
def test_a_run_that_was_ended_is_deleted_when_its_time_is_over(make: Make) -> None:
    run = make(schedule={"ttlSecondsAfterFinished": 1})
    end_well(run)
    until(lambda: run.cluster.kubectl("get", "trun", "-n", run.namespace, "-o", "name") == "", "the run to go")


@on(NO_KUEUE, NEITHER)
@together
def test_a_deadline_stops_the_run(make: Make) -> None:
    run = make(schedule={"activeDeadlineSeconds": 2})
    both_pods(run)
    run.wait("Failed", "DeadlineExceeded")
    until(lambda: run.objects("pods") == [], "the pods to go")


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


@on(NO_KUEUE)
@pytest.mark.parametrize(("spec", "kind", "reason", "words"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_work_says_so_and_makes_nothing(
    make: Make, spec: dict[str, Any], kind: str, reason: str, words: str
) -> None:
    run = make(**spec)
    status = run.wait("Pending", reason)
    assert words in status["message"]
    assert run.condition(kind)["status"] == "False"
    assert run.objects() == []


@on(NO_KUEUE, NEITHER)
@together
def test_node_0_has_the_name_that_the_others_look_for(make: Make, engines: Engines) -> None:
    """A headless Service gives every pod a name, also before it is ready: the JobSet's own, or the operator's for a Job."""
    run = make()
    api = run.cluster.api
    first, second = both_pods(run)
    service = api.get(place("services", run.namespace, "run-1"))
    assert service is not None
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    names = {f"{pod['spec']['hostname']}.{pod['spec']['subdomain']}" for pod in (first, second)}
    assert rendezvous("run-1", engines.backend).split(":")[0] in names
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{run.namespace}/endpointslices"

    def named() -> set[str]:
        found = api.get(slices, labelSelector="kubernetes.io/service-name=run-1") or {}
        return {end["hostname"] for each in found["items"] for end in each["endpoints"] or () if "hostname" in end}

    until(lambda: {f"{name}.run-1" for name in named()} == names, "the names of both pods")


# --- quotas and queues -------------------------------------------------------------------------------------------------------


@on(NO_KUEUE, NEITHER, FULL)
@together
def test_a_gang_that_does_not_fit_into_the_resource_quota_makes_no_pod(make: Make) -> None:
    """Of two gangs that together are too large none may hold half of the quota; a third one never fits."""
    first = make("first", quota=2)
    both_pods(first)
    second = make("second")
    third = make("third", parallelism={"nodes": 3}, hyperparameters={"globalBatchSize": 12})
    for run, said in (
        (second, "2, ResourceQuota gpus has 0 of 2 left"),
        (third, "3, ResourceQuota gpus allows 2 at most"),
    ):
        status = run.wait("Queued", "WaitingForQuota")
        assert status["message"] == f"waiting for the whole gang to fit: requests.nvidia.com/gpu: needs {said}"
        assert run.condition("Admitted")["reason"] == "WaitingForQuota"
        assert run.objects() == []
    end_well(first)
    first.wait("Succeeded")
    assert len(both_pods(second)) == 2
    until(lambda: second.condition("Admitted")["status"] == "True", "the status to say that it fits")
    assert third.objects() == []


@on(FULL)
@together
def test_the_second_run_waits_for_quota_and_starts_when_the_first_has_ended(make: Make) -> None:
    first = make("first", queued=2, schedule={"queue": "gpu"})
    both_pods(first)
    second = make("second", schedule={"queue": "gpu"})
    status = second.wait("Queued", "WaitingForQuota")
    assert status["queue"]["position"] == 1
    assert second.pods() == []
    end_well(first)
    first.wait("Succeeded")
    assert len(both_pods(second)) == 2
    until(lambda: second.condition("Admitted")["status"] == "True", "the status to say so")


@on(FULL)
@together
def test_a_run_larger_than_the_quota_says_so(make: Make) -> None:
    run = make(queued=1, schedule={"queue": "gpu"})
    run.wait("Queued", "ExceedsMaxQuota")


@on(FULL)
@together
def test_a_higher_priority_takes_the_quota_and_gives_it_back(make: Make) -> None:
    low = make("low", queued=2, schedule={"queue": "gpu"})
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
    end_well(high)
    high.wait("Succeeded")
    assert len(both_pods(low)) == 2
    assert low.status()["restarts"]["counted"] == 0


@on(FULL)
@together
def test_a_queue_that_is_stopped_or_deleted_is_named(make: Make) -> None:
    """What was running is stopped and goes on when the queue does."""
    run = make(queued=2, schedule={"queue": "gpu"})
    both_pods(run)
    cluster_queue = f"/apis/kueue.x-k8s.io/v1beta1/clusterqueues/{run.namespace}"
    run.cluster.api.send("PATCH", cluster_queue, {"spec": {"stopPolicy": "HoldAndDrain"}})
    status = run.wait("Suspended", "Preempted")
    assert "ClusterQueueStopped" in status["message"]
    until(lambda: run.objects("pods") == [], "the pods to go")
    run.cluster.api.send("PATCH", cluster_queue, {"spec": {"stopPolicy": "None"}})
    both_pods(run)
    assert run.status()["restarts"] == {"counted": 0, "uncounted": 0}

    run.cluster.kubectl("delete", "localqueue", "gpu", "-n", run.namespace)
    other = make("other", schedule={"queue": "gpu"})
    status = other.wait("Queued", "NoQueue")
    assert "LocalQueue gpu doesn't exist" in status["message"]
    assert len(run.pods()) == 2


# --- the operator itself ----------------------------------------------------------------------------------------------


def completed(run: ClusterRun, engines: Engines) -> bool:
    """Whether the child has ended well, as its own controller says."""
    kinds = {"Completed", "Complete"}
    conditions = run.objects(engines.child)[0].get("status", {}).get("conditions", ())
    return any(each["type"] in kinds and each["status"] == "True" for each in conditions)


@on(NEITHER, FULL)
def test_the_operator_is_killed_and_back_after_the_run_has_ended(
    operator: OperatorProcess, make: Make, engines: Engines
) -> None:
    run = make()
    pods = both_pods(run)
    operator.kill()
    if engines.kueue:
        operator.identity = "another"  # has to wait until the Lease is over; elsewhere it is the same container again
    for pod in pods:
        run.end_pod(pod, 0, result(ExitCode.DONE))
    until(lambda: completed(run, engines), "the child to complete")
    operator.start()
    run.wait("Succeeded")


@on(NO_KUEUE, NEITHER)
def test_a_run_is_deleted_while_the_operator_is_away(operator: OperatorProcess, make: Make) -> None:
    run = make()
    both_pods(run)
    operator.kill()
    assert [each for each in (run.get(), *run.objects()) if "atelier" in str(each["metadata"].get("finalizers"))] == []
    run.delete()
    until(lambda: run.objects() == [], "everything to go")
    operator.start()
    both_pods(make("another"))


@on(NO_KUEUE)
def test_a_call_that_is_denied_is_found_in_the_audit_log(operator: OperatorProcess, make: Make, rights: Rights) -> None:
    """The check that every test here ends with: it fails when the role lacks a rule."""
    api, role = operator.cluster.api, f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{ACCOUNT}"
    rules = (api.get(role) or {})["rules"]
    fewer = [rule for rule in rules if "configmaps" not in rule["resources"]]
    assert len(fewer) == len(rules) - 1
    api.send("PATCH", role, {"rules": fewer})
    try:
        run = make()
        run.wait("Pending", "NotPermitted")
        with pytest.raises(
            AssertionError, match=rf"roles do not allow .*'create', '/api/v1/namespaces/{run.namespace}"
        ):
            rights.check()
    finally:
        api.send("PATCH", role, {"rules": rules})
    both_pods(run)
    rights.forget()
