"""A node that dies with a run on it: a real control plane gives it up, and only the operator's force brings the run on."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.local import Cluster
from cluster_documents import PROFILE, run_document
from cluster_kinds import as_the_chart_allows
from operator_process import ClusterRun, OperatorProcess, forget_namespace, until

pytest_plugins = ("cluster_fixtures", "cluster_kinds")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400), as_the_chart_allows]

Object = dict[str, Any]
NODE = "without-kubelet"
NAMESPACE = "lost-node"


@pytest.fixture(scope="module")
def fake_cluster(start_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    """One that gives a node up soon, with no other nodes, which might be too busy to say something in time."""
    with start_cluster(kueue=False, node_grace_seconds=8) as cluster:
        yield cluster


def node_without_kubelet(operator: OperatorProcess) -> None:
    """A node that says once that it is ready, and nothing more."""
    cluster = operator.cluster
    room = {"cpu": "8", "memory": "64Gi", "pods": "10", "nvidia.com/gpu": "1"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {"kind": NODE}}}
    cluster.apply(json.dumps(node))
    status: Object = {"capacity": room, "allocatable": room, "conditions": [{"type": "Ready", "status": "True"}]}
    patch(operator, "node", NODE, status)


def patch(operator: OperatorProcess, kind: str, name: str, status: Object, *options: str) -> None:
    change = json.dumps({"status": status})
    operator.cluster.kubectl("patch", kind, name, "--subresource=status", "--type=merge", "-p", change, *options)


def profile() -> Object:
    """Runs of the namespace go to that node alone."""
    document = copy.deepcopy(PROFILE)
    document["kind"] = "TrainingProfile"
    document["metadata"] = {"name": "default", "namespace": NAMESPACE}
    document["spec"]["gpuClasses"][0]["nodeSelector"] = [{"key": "kind", "value": NODE}]
    return document


def test_a_run_on_a_node_that_dies_goes_on_elsewhere(operator: OperatorProcess) -> None:
    """With one node its Job never notices: a pod that is being deleted is neither failed nor gone."""
    cluster = operator.cluster
    cluster.make_namespace(NAMESPACE)
    cluster.apply(json.dumps(profile()))
    node_without_kubelet(operator)
    reference = {"kind": "TrainingProfile", "name": "default"}
    document = run_document(NAMESPACE, "run", parallelism={"nodes": 1, "gpusPerNode": 1}, profileRef=reference)
    cluster.apply(json.dumps(document))
    run = ClusterRun(cluster, NAMESPACE, "run")
    (pod,) = until(lambda: [each for each in run.objects("pods") if each["spec"].get("nodeName")], "a pod on the node")
    name = pod["metadata"]["name"]
    state = {"name": "trainer", "image": "x", "imageID": "", "ready": True, "restartCount": 0, "state": {"running": {}}}
    patch(operator, "pod", name, {"phase": "Running", "containerStatuses": [state]}, "-n", NAMESPACE)
    run.wait("Preparing")

    # As its eviction would five minutes after the node was given up; now, so that its grace is over by then.
    cluster.kubectl("delete", "pod", name, "-n", NAMESPACE, "--wait=false", "--grace-period=1")
    status = until(lambda: s if (s := run.status()).get("attempt") == 2 else None, "another attempt", 180)
    assert (status["attempts"][0]["reason"], status["restarts"]["uncounted"]) == ("NodeLost", 1)
    assert f"node {NODE} does not answer" in status["attempts"][0]["message"]
    assert name not in {each["metadata"]["name"] for each in run.objects("pods")}
    assert [each["metadata"]["name"] for each in run.objects("jobsets")] == ["run-2"]
    events = cluster.kubectl("get", "events", "-n", NAMESPACE, "--field-selector", "reason=NodeLost", "-o", "name")
    assert len(events.split()) >= 1
    forget_namespace(cluster, NAMESPACE)
    cluster.kubectl("delete", "node", NODE)
