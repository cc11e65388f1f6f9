"""Two real nodes: containers with logs, exit codes and names, torch across nodes from the tested environment, an S3 server."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.daemons import wait_for
from cluster.images import BASE_IMAGE
from cluster.local import Cluster
from cluster.traces import machine, traces_of
from s3_server import BUCKET, running_server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures",)

ALL_REDUCE = """
    import os, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(4) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", total[0].item(), "on", os.environ["NODE"], flush=True)
"""
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
PUT = """
    import boto3, os
    client = boto3.client("s3", endpoint_url=os.environ["S3_URL"], region_name="us-east-1")
    client.put_object(Bucket=os.environ["BUCKET"], Key="from-a-pod", Body=b"hello")
    print(client.get_object(Bucket=os.environ["BUCKET"], Key="from-a-pod")["Body"].read().decode())
"""


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


def in_the_tested_environment(container: dict[str, Any]) -> dict[str, Any]:
    """A pod's spec whose container sees the virtual environment of this test, and the Python below it, read-only at their paths."""
    folders = {"environment": sys.prefix, "python": sys.base_prefix}
    mounts = [{"name": name, "mountPath": path, "readOnly": True} for name, path in folders.items()]
    volumes = [{"name": name, "hostPath": {"path": path}} for name, path in folders.items()]
    shared_memory = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}}
    container = {
        "name": "c",
        "image": BASE_IMAGE,
        "imagePullPolicy": "Never",
        **container,
        "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {"restartPolicy": "Never", "containers": [container], "volumes": [*volumes, shared_memory]}


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


def test_torchrun_reduces_over_two_nodes(real_cluster: Cluster) -> None:
    namespace = real_cluster.make_namespace("torch")
    script = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "script", "namespace": namespace},
        "data": {"main.py": textwrap.dedent(ALL_REDUCE)},
    }
    node_name = {"fieldRef": {"fieldPath": "spec.nodeName"}}
    settings = [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"}]
    rendezvous = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=pair-w-0-0.pair:29500",
        "--rdzv-id=x",
    ]
    pod = in_the_tested_environment(
        {
            "command": [f"{sys.prefix}/bin/python", "-m", "torch.distributed.run", *rendezvous, "/script/main.py"],
            "env": [*settings, {"name": "NODE", "valueFrom": node_name}],
            "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "2Gi"}},  # all that a node has: one pod per node
        }
    )
    pod["volumes"].append({"name": "script", "configMap": {"name": "script"}})
    pod["containers"][0]["volumeMounts"].append({"name": "script", "mountPath": "/script"})
    job = {"parallelism": 2, "completions": 2, "backoffLimit": 0, "template": {"spec": pod}}
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "pair", "namespace": namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            # On a busy machine a name may not be in the DNS yet when it is asked for.
            "failurePolicy": {"maxRestarts": 3},
            "replicatedJobs": [{"name": "w", "template": {"spec": job}}],
        },
    }
    real_cluster.apply([script, job_set])
    ended = "--for=jsonpath={.status.terminalState}=Completed"
    real_cluster.kubectl("wait", ended, "jobset/pair", f"--namespace={namespace}", "--timeout=300s")
    selector = "jobset.sigs.k8s.io/jobset-name=pair"
    lines = real_cluster.kubectl("logs", "-l", selector, "--tail=-1", f"--namespace={namespace}").splitlines()
    results = sorted(line for line in lines if line.startswith("rank"))
    assert [line.rpartition(" on ")[0] for line in results] == ["rank 0 of 2 sum 3.0", "rank 1 of 2 sum 3.0"]
    assert {line.rpartition(" ")[2] for line in results} == {"node1", "node2"}


def test_pods_wait_for_gpus_that_others_hold(real_cluster: Cluster) -> None:
    namespace = real_cluster.make_namespace("gpus")
    limits = {"limits": {"nvidia.com/gpu": 2}}
    pods = [python_pod(name, namespace, "import time; time.sleep(5)") for name in ("one", "two", "three")]
    for pod in pods:
        pod["spec"]["containers"][0]["resources"] = limits
    real_cluster.apply(pods[:2])
    wait_for_phase(real_cluster, "one", namespace, "Running")
    real_cluster.apply(pods[2])

    def refused() -> bool:
        conditions = real_cluster.get("pod", "three", f"--namespace={namespace}")["status"].get("conditions", [])
        return any("Insufficient nvidia.com/gpu" in entry.get("message", "") for entry in conditions)

    wait_for("the third pod was not told to wait", refused, 5)
    wait_for_phase(real_cluster, "three", namespace, "Succeeded")


def test_a_pod_uses_an_s3_server_of_the_test(real_cluster: Cluster, tmp_path: Path) -> None:
    namespace = real_cluster.make_namespace("s3")
    with running_server(tmp_path) as server:
        address = real_cluster.share(int(server.url.rpartition(":")[2]))
        values = {**server.environment, "S3_URL": f"http://{address}", "BUCKET": BUCKET, "NO_PROXY": "*"}
        container = {
            "command": [f"{sys.prefix}/bin/python", "-c", textwrap.dedent(PUT)],
            "env": [{"name": name, "value": value} for name, value in values.items()],
        }
        metadata = {"name": "put", "namespace": namespace}
        real_cluster.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": in_the_tested_environment(container)}
        )
        wait_for_phase(real_cluster, "put", namespace, "Succeeded")
        assert (server.folder / "from-a-pod").read_bytes() == b"hello"


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


def test_nodes_go_without_a_trace_while_pods_run(start_cluster: Callable[..., Cluster]) -> None:
    before = machine()
    with start_cluster(nodes=1, jobset=False, kueue=False) as cluster:
        namespace = cluster.make_namespace("running")
        cluster.apply(python_pod("stays", namespace, "import time; time.sleep(1000)"))
        wait_for_phase(cluster, "stays", namespace, "Running")
        assert any("containerd-shim" in trace for trace in traces_of(cluster.name))
    assert traces_of(cluster.name) == []
    assert machine() == before
