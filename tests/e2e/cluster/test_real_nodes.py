"""Two real nodes: containers with logs, exit codes and names, GPUs, and an end without a trace.

That training pods see the tested environment, find each other by a JobSet's names and reach an S3 server of the test is tried by the
runs of tests/e2e/operator/test_training_on_real_nodes.py.
"""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.daemons import wait_for
from cluster.images import BASE_IMAGE
from cluster.local import Cluster
from cluster.traces import machine, traces_of

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures",)

LISTEN = """
    import signal, socket, sys
    def end(number, frame):
        open("/dev/termination-log", "w").write('{"step": 42}')
        sys.exit(75)
    signal.signal(signal.SIGTERM, end)
    server = socket.create_server(("", 29500))
    print("listening", flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(b"hello from a")
        connection.close()
"""
CALL = """
    import os, socket, ssl, sys, time, urllib.request
    for _ in range(100):
        try:
            print(socket.create_connection(("a.net", 29500), 2).recv(100).decode(), flush=True)
            break
        except OSError as error:
            print(error, flush=True)
            time.sleep(0.2)
    account = "/var/run/secrets/kubernetes.io/serviceaccount/"
    url = "https://%s/version" % os.environ["KUBERNETES_SERVICE_HOST"]
    trust = ssl.create_default_context(cafile=account + "ca.crt")
    print("API through its Service:", urllib.request.urlopen(url, context=trust, timeout=10).status, flush=True)
    open("/dev/termination-log", "w").write("bye")
    sys.exit(3)
"""
STAY = "import time; time.sleep(1000)"


@pytest.fixture(scope="module")
def before() -> frozenset[str]:
    """The machine as it was without the cluster."""
    return machine()


@pytest.fixture(scope="module")
def real_cluster(start_cluster: Callable[..., Cluster], before: frozenset[str]) -> Iterator[Cluster]:
    """Two nodes that claim two GPUs each. The last test takes it away."""
    with start_cluster(nodes=2, gpus_per_node=2, jobset=False, kueue=False) as cluster:
        yield cluster


def python_pod(name: str, namespace: str, text: str, **more: Any) -> dict[str, Any]:
    """A pod of the base image that runs a Python text, as "x" of the headless service "net"."""
    container = {
        "name": "c",
        "image": BASE_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", textwrap.dedent(text)],
        "resources": {"limits": {"memory": "256Mi"}},
    }
    spec = {
        "hostname": name,
        "subdomain": "net",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 10,
        "containers": [container],
    }
    metadata = {"name": name, "namespace": namespace, "labels": {"in": "net"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec, **more}}


def wait_for_phase(cluster: Cluster, name: str, namespace: str, phase: str) -> None:
    cluster.kubectl(
        "wait", f"--for=jsonpath={{.status.phase}}={phase}", f"pod/{name}", f"--namespace={namespace}", "--timeout=120s"
    )


def test_pods_of_two_nodes_find_each_other_by_name(real_cluster: Cluster) -> None:
    namespace = real_cluster.make_namespace("names")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "net", "namespace": namespace},
        "spec": {"clusterIP": "None", "selector": {"in": "net"}, "publishNotReadyAddresses": True},
    }
    listening = python_pod("a", namespace, LISTEN, nodeName="node1")
    listening["metadata"]["finalizers"] = ["atelier.dev/keep"]  # a deleted pod would vanish with its exit code
    real_cluster.apply([service, listening, python_pod("b", namespace, CALL, nodeName="node2")])
    wait_for_phase(real_cluster, "b", namespace, "Failed")
    caller = real_cluster.get("pod", "b", f"--namespace={namespace}")
    ended = caller["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (3, "bye")
    logs = real_cluster.kubectl("logs", "b", f"--namespace={namespace}")
    assert "hello from a" in logs
    assert "API through its Service: 200" in logs
    assert real_cluster.kubectl("exec", "a", f"--namespace={namespace}", "--", "hostname").strip() == "a"

    real_cluster.kubectl("delete", "pod", "a", f"--namespace={namespace}", "--wait=false")
    wait_for_phase(real_cluster, "a", namespace, "Failed")
    told = real_cluster.get("pod", "a", f"--namespace={namespace}")["status"]["containerStatuses"][0]["state"][
        "terminated"
    ]
    assert (told["exitCode"], told["message"]) == (75, '{"step": 42}')
    real_cluster.kubectl(
        "patch", "pod", "a", f"--namespace={namespace}", "--type=merge", "-p", '{"metadata":{"finalizers":null}}'
    )


def test_pods_wait_for_gpus_that_others_hold(real_cluster: Cluster) -> None:
    namespace = real_cluster.make_namespace("gpus")
    limits = {"limits": {"nvidia.com/gpu": 2}}
    pods = [python_pod(name, namespace, text) for name, text in (("one", STAY), ("two", STAY), ("three", ""))]
    for pod in pods:
        pod["spec"]["containers"][0]["resources"] = limits
    real_cluster.apply(pods[:2])
    wait_for_phase(real_cluster, "one", namespace, "Running")
    real_cluster.apply(pods[2])

    def refused() -> bool:
        conditions = real_cluster.get("pod", "three", f"--namespace={namespace}")["status"].get("conditions", [])
        return any("Insufficient nvidia.com/gpu" in entry.get("message", "") for entry in conditions)

    wait_for("the third pod was not told to wait", refused, 5)
    real_cluster.kubectl("delete", "pod", "two", f"--namespace={namespace}", "--grace-period=1")
    wait_for_phase(real_cluster, "three", namespace, "Succeeded")


def test_a_node_can_be_cut_off_and_connected_again(real_cluster: Cluster) -> None:
    connect = "import socket; socket.create_connection(('10.250.0.12', 10250), 2)"

    def reached() -> bool:
        command = [*real_cluster.inside, sys.executable, "-c", connect]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert reached()
    real_cluster.disconnect("node2")
    try:
        assert not reached()
    finally:
        real_cluster.connect("node2")
    wait_for("node2 is not reached again", reached, 10)


def test_nodes_go_without_a_trace_while_pods_run(real_cluster: Cluster, before: frozenset[str]) -> None:
    """The last test of the file."""
    namespace = real_cluster.make_namespace("running")
    real_cluster.apply(python_pod("stays", namespace, STAY))
    wait_for_phase(real_cluster, "stays", namespace, "Running")
    assert any("containerd-shim" in trace for trace in traces_of(real_cluster.name))
    real_cluster.down()
    assert traces_of(real_cluster.name) == []
    assert machine() == before
