"""The local cluster's control plane: it comes and goes without a trace, its parts can be stopped, its audit log read."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cluster import state
from cluster.daemons import ClusterError
from cluster.local import Cluster
from cluster.traces import machine, traces_of
from operator_process import until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures",)
STARTED_ELSEWHERE = """
import time
from cluster.local import Cluster
print(Cluster.start(jobset=False, kueue=False).name, flush=True)
time.sleep(600)
"""
SUPPORT = Path(__file__).resolve().parents[2] / "support"

JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": "one"},
    "spec": {
        "replicatedJobs": [
            {
                "name": "w",
                "template": {
                    "spec": {
                        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "none"}]}}
                    }
                },
            }
        ]
    },
}


@pytest.fixture(scope="module")
def bare_cluster(start_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    with start_cluster(jobset=False, kueue=False) as cluster:
        yield cluster


def test_going_up_and_down_twice_leaves_nothing_behind(start_cluster: Callable[..., Cluster]) -> None:
    before = machine()
    for engines in (True, False):
        with start_cluster(kwok=2, jobset=engines, kueue=engines) as cluster:
            assert len(cluster.get("nodes")["items"]) == 2
            assert all(cluster.processes().values())
            assert len(traces_of(cluster.name)) > len(cluster.processes())
        assert traces_of(cluster.name) == []
        assert machine() == before


def test_a_cluster_goes_with_the_process_that_started_it(bare_cluster: Cluster) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen(
        [sys.executable, "-c", STARTED_ELSEWHERE], env=environment, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        record = state.find(name)
        assert record is not None
        pids = [pid for pid in Cluster(record).processes().values() if pid is not None]
        assert len(pids) == 4
        owner.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "processes outlived their owner"
        time.sleep(0.1)
    state.remove_orphans()  # as the next cluster that starts does, perhaps one of another test at this moment
    until(lambda: state.find(name) is None, "the removal of what a killed owner left")
    assert state.find(bare_cluster.name) is not None


def test_jobset_can_appear_and_go(bare_cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="doesn't have a resource type"):
        bare_cluster.kubectl("get", "jobsets")
    bare_cluster.add_jobset()
    bare_cluster.apply(JOBSET)
    bare_cluster.stop("jobset")
    with pytest.raises(ClusterError, match="failed calling webhook"):
        bare_cluster.apply({**JOBSET, "metadata": {"name": "two"}})
    bare_cluster.restart("jobset")
    bare_cluster.apply({**JOBSET, "metadata": {"name": "two"}})
    assert {item["metadata"]["name"] for item in bare_cluster.get("jobsets")["items"]} == {"one", "two"}


def test_a_killed_api_server_comes_back_with_its_objects(bare_cluster: Cluster) -> None:
    bare_cluster.kubectl("create", "configmap", "kept")
    killed = bare_cluster.pid("apiserver")
    bare_cluster.kill("apiserver", signal.SIGKILL)
    with pytest.raises(ClusterError, match="refused"):
        bare_cluster.kubectl("get", "configmap", "kept")
    bare_cluster.restart("apiserver")
    assert bare_cluster.pid("apiserver") != killed
    assert bare_cluster.get("configmap", "kept")["metadata"]["name"] == "kept"


def test_the_audit_log_has_bodies_of_pods_and_none_of_secrets(bare_cluster: Cluster) -> None:
    namespace = bare_cluster.make_namespace("audited")
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "none"}]}
    bare_cluster.apply(
        [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": namespace}, "spec": pod},
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s", "namespace": namespace},
                "stringData": {"token": "hidden"},
            },
        ]
    )
    by_admin = [
        event for event in bare_cluster.audit() if event["user"]["username"] == "admin" and event["verb"] == "patch"
    ]
    written = [event for event in by_admin if event["objectRef"].get("namespace") == namespace]
    by_kind = {event["objectRef"]["resource"]: event for event in written}
    assert by_kind["pods"]["requestObject"]["spec"]["containers"][0]["image"] == "none"
    assert "requestObject" not in by_kind["secrets"]
    assert "responseObject" not in by_kind["secrets"]


def test_a_service_account_has_its_own_rights_only(bare_cluster: Cluster) -> None:
    namespace = bare_cluster.make_namespace("limited")
    bare_cluster.kubectl("create", "serviceaccount", "reader", f"--namespace={namespace}")
    kubeconfig = bare_cluster.kubeconfig_of_service_account(namespace, "reader")
    with pytest.raises(ClusterError, match=f"system:serviceaccount:{namespace}:reader.*cannot list"):
        bare_cluster.kubectl("get", "pods", f"--kubeconfig={kubeconfig}")


def test_helm_installs_a_chart_made_for_this_kubernetes(bare_cluster: Cluster, tmp_path: Path) -> None:
    chart = {"apiVersion": "v2", "name": "small", "version": "0.1.0", "kubeVersion": ">=1.36.0-0"}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(chart))
    (tmp_path / "templates").mkdir()
    template = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "made"},
        "data": {"by": "{{ .Release.Name }}"},
    }
    (tmp_path / "templates" / "map.yaml").write_text(yaml.safe_dump(template))
    assert "name: made" in bare_cluster.helm("template", "first", str(tmp_path))
    bare_cluster.helm("install", "first", str(tmp_path), "--wait")
    assert bare_cluster.get("configmap", "made")["data"] == {"by": "first"}
    bare_cluster.helm("uninstall", "first")
