"""JobSet and Kueue with pods on fake GPU nodes."""

from typing import Any

import pytest

from cluster.daemons import wait_for
from cluster.local import Cluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures",)


def fake_job_set(name: str, namespace: str, annotations: dict[str, str], queue: str | None = None) -> dict[str, Any]:
    """Two pods of one GPU each that do what the annotations say."""
    container = {"name": "c", "image": "none", "resources": {"limits": {"nvidia.com/gpu": 1}}}
    pod = {"restartPolicy": "Never", "nodeSelector": {"type": "kwok"}, "containers": [container]}
    template = {"metadata": {"annotations": annotations}, "spec": pod}
    job = {"parallelism": 2, "completions": 2, "backoffLimit": 0, "template": template}
    labels = {} if queue is None else {"kueue.x-k8s.io/queue-name": queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"replicatedJobs": [{"name": "w", "template": {"spec": job}}]},
    }


def two_gpu_queue(name: str, namespace: str) -> list[dict[str, Any]]:
    """A local queue of the same name in the namespace, with room for two GPUs on fake nodes."""
    quotas = [{"name": "nvidia.com/gpu", "nominalQuota": 2}]
    group = {"coveredResources": ["nvidia.com/gpu"], "flavors": [{"name": name, "resources": quotas}]}
    api = "kueue.x-k8s.io/v1beta1"
    return [
        {
            "apiVersion": api,
            "kind": "ResourceFlavor",
            "metadata": {"name": name},
            "spec": {"nodeLabels": {"type": "kwok"}},
        },
        {
            "apiVersion": api,
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {"namespaceSelector": {}, "resourceGroups": [group]},
        },
        {
            "apiVersion": api,
            "kind": "LocalQueue",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterQueue": name},
        },
    ]


def wait_for_end(cluster: Cluster, name: str, namespace: str, state: str = "Completed") -> None:
    cluster.kubectl(
        "wait",
        f"--for=jsonpath={{.status.terminalState}}={state}",
        f"jobset/{name}",
        f"--namespace={namespace}",
        "--timeout=60s",
    )


def test_a_job_set_runs_and_completes(fake_cluster: Cluster) -> None:
    namespace = fake_cluster.make_namespace("completes")
    fake_cluster.apply(fake_job_set("good", namespace, {"sim/run-for": "1s"}))
    wait_for_end(fake_cluster, "good", namespace)
    pods = fake_cluster.get("pods", f"--namespace={namespace}")["items"]
    assert [pod["status"]["phase"] for pod in pods] == ["Succeeded"] * 2
    assert {pod["spec"]["nodeName"][:5] for pod in pods} == {"fake-"}


def test_exit_code_and_message_come_from_annotations(fake_cluster: Cluster) -> None:
    namespace = fake_cluster.make_namespace("fails")
    annotations = {"sim/run-for": "500ms", "sim/exit-code": "75", "sim/message": '{"step": 10}'}
    fake_cluster.apply(fake_job_set("bad", namespace, annotations))
    wait_for_end(fake_cluster, "bad", namespace, "Failed")
    pods = fake_cluster.get("pods", f"--namespace={namespace}")["items"]
    ended = [
        pod["status"]["containerStatuses"][0]["state"]["terminated"]
        for pod in pods
        if pod["status"]["phase"] == "Failed"
    ]
    assert {(found["exitCode"], found["message"]) for found in ended} == {(75, '{"step": 10}')}


def test_pods_without_an_annotation_keep_running_also_when_kwok_is_restarted(fake_cluster: Cluster) -> None:
    namespace = fake_cluster.make_namespace("stays")
    fake_cluster.apply(fake_job_set("stays", namespace, {}))
    running = ["wait", "--for=jsonpath={.status.phase}=Running", f"--namespace={namespace}", "--timeout=60s", "pod"]
    selector = ["-l", "jobset.sigs.k8s.io/jobset-name=stays"]
    wait_for("no pods", lambda: len(fake_cluster.get("pods", f"--namespace={namespace}", *selector)["items"]) == 2)
    fake_cluster.kubectl(*running, *selector)
    fake_cluster.stop("kwok")
    fake_cluster.restart("kwok")
    fake_cluster.apply(fake_job_set("later", namespace, {"sim/run-for": "1s"}))
    wait_for_end(fake_cluster, "later", namespace)
    pods = fake_cluster.get("pods", f"--namespace={namespace}", *selector)["items"]
    assert [pod["status"]["phase"] for pod in pods] == ["Running"] * 2
    fake_cluster.kubectl("delete", "jobset", "stays", f"--namespace={namespace}")  # other modules want the GPUs


def test_kueue_admits_one_of_two_job_sets_within_a_quota(fake_cluster: Cluster) -> None:
    namespace = fake_cluster.make_namespace("queued")
    fake_cluster.apply(two_gpu_queue("two-gpus", namespace))
    for name in ("first", "second"):
        fake_cluster.apply(fake_job_set(name, namespace, {"sim/run-for": "4s"}, queue="two-gpus"))
        # Kueue may take two waiting workloads of one second in any order.
        wait_for(f"no workload of {name}", lambda: name in workloads(fake_cluster, namespace))  # noqa: B023
        if name == "first":
            wait_for("first not admitted", lambda: workloads(fake_cluster, namespace)["first"] == "True")
    assert workloads(fake_cluster, namespace)["second"] != "True"
    suspended = {
        item["metadata"]["name"]: item["spec"]["suspend"]
        for item in fake_cluster.get("jobsets", f"--namespace={namespace}")["items"]
    }
    assert suspended == {"first": False, "second": True}
    wait_for_end(fake_cluster, "first", namespace)
    wait_for_end(fake_cluster, "second", namespace)


def workloads(cluster: Cluster, namespace: str) -> dict[str, str]:
    """Whether the workload of each JobSet has its quota: "True", "False" or "" where nothing was decided."""
    found = {}
    for item in cluster.get("workloads", f"--namespace={namespace}")["items"]:
        owner = item["metadata"]["ownerReferences"][0]["name"]
        conditions = {entry["type"]: entry["status"] for entry in item.get("status", {}).get("conditions", [])}
        found[owner] = conditions.get("QuotaReserved", "")
    return found
