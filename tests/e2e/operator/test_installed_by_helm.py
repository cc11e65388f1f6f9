"""Atelier as an administrator has it: the chart installed with the image of `images/operator`, two replicas in pods of two real nodes.

Pod Security "restricted" is enforced on them, they talk to the API server by its Service and with their service account's token, and
they ask training pods for progress over the pod network.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chart_release import ACCOUNT, CHART, SYSTEM
from cluster.buildah import BuiltImage
from cluster.daemons import ClusterError
from cluster.local import Cluster
from cluster_documents import run_document
from cluster_training import (
    REPOSITORY,
    SECONDS,
    Place,
    assert_a_lora_of_all_steps,
    profile,
    stock_diffusers_loads,
    training,
)
from operator_process import ClusterRun, until
from s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures", "cluster_training")

TEAM = "art"

Object = dict[str, Any]


@dataclass(frozen=True)
class Installation:
    """The release `atelier`, and a team's namespace to train in."""

    place: Place
    folder: Path
    values: Mapping[str, Any]

    @property
    def cluster(self) -> Cluster:
        return self.place.cluster

    def helm(self, verb: str, *arguments: str, team_cpu: str) -> None:
        """Install or upgrade, with so much CPU for the team's runs."""
        values = copy.deepcopy(dict(self.values))
        values["quotas"]["teams"][0]["host"] = {"cpu": team_cpu}
        path = self.folder / "values.json"
        path.write_text(json.dumps(values))
        given = ["-f", str(path), f"--namespace={SYSTEM}", "--wait", "--timeout=1m"]
        try:
            self.cluster.helm(verb, "atelier", str(CHART), *given, *arguments)
        except ClusterError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self) -> str:
        """What happened to the replicas, for whoever reads of a failure."""
        place = f"--namespace={SYSTEM}"
        logs = self.cluster.kubectl("logs", place, f"deployment/{ACCOUNT}", "--tail=40", "--ignore-errors")
        return self.cluster.kubectl("get", "pods,events", place, "-o", "wide") + logs

    def replicas(self) -> list[Object]:
        """The operator's pods that are not on their way out."""
        pods = self.cluster.get("pods", f"--namespace={SYSTEM}", "-l", "app.kubernetes.io/component=operator")["items"]
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def leader(self) -> str:
        """The pod that holds the Lease; nothing while nobody does."""
        return str(self.cluster.get("lease", ACCOUNT, f"--namespace={SYSTEM}")["spec"].get("holderIdentity") or "")


@pytest.fixture(scope="module")
def installation(
    start_cluster: Callable[..., Cluster],
    operator_image: BuiltImage,
    store: S3Server,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    image = {"repository": operator_image.repository, "tag": operator_image.tag, "pullPolicy": "Never"}
    team = {"name": TEAM, "namespaces": [TEAM], "gpus": [{"flavor": "gpu", "quota": 2}]}
    with start_cluster(nodes=2) as cluster:
        given = profile(base) | {"storage": storage(cluster, store)}
        values = {
            "operator": {"image": image, "progressSeconds": 1},
            "profiles": {"cluster": {"default": given}},
            "quotas": {"engine": "kueue", "flavors": [{"name": "gpu"}], "teams": [team]},
        }
        cluster.import_image(operator_image.archive)
        cluster.make_namespace(SYSTEM)
        cluster.kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted")
        place = Place.make(cluster, TEAM, store, base)
        made = Installation(place, tmp_path_factory.mktemp("values"), values)
        made.helm("install", team_cpu="10")
        yield made


def storage(cluster: Cluster, store: S3Server) -> Object:
    """The store of runs that name none, as the profile has it."""
    endpoint = f"http://{cluster.share(int(store.url.rsplit(':', 1)[1]))}"
    return {"uri": f"s3://{BUCKET}/runs", "s3": {"endpoint": endpoint}, "credentialsRef": {"name": "s3"}}


def test_two_replicas_are_ready_and_one_leads(installation: Installation) -> None:
    pods = installation.replicas()
    assert {pod["spec"]["nodeName"] for pod in pods} == {"node1", "node2"}
    assert all(status["ready"] for pod in pods for status in pod["status"]["containerStatuses"])
    assert until(installation.leader, "a leader") in {pod["metadata"]["name"] for pod in pods}
    installation.cluster.helm("test", "atelier", f"--namespace={SYSTEM}")
    policies = installation.cluster.get("networkpolicies", f"--namespace={SYSTEM}")["items"]
    assert [each["metadata"]["name"] for each in policies] == [ACCOUNT]


def test_the_api_server_asks_the_webhook_by_its_service(installation: Installation) -> None:
    wide = json.dumps(run_document(TEAM, "wide", parallelism={"gpusPerNode": 1}))

    def refusal() -> str:
        try:
            installation.cluster.kubectl("create", "--dry-run=server", "-f", "-", input=wide)
        except ClusterError as error:
            return str(error)
        return ""

    said = until(refusal, "the webhook to be asked")
    assert 'admission webhook "trainingruns.atelier.dev" denied the request' in said
    assert "spec.parallelism.gpusPerNode is 1, but the profile has no gpuClasses" in said


@pytest.fixture(scope="module")
def admitted(installation: Installation) -> ClusterRun:
    """A run that has waited for its team's quota until an upgrade raised it, and trains until it is deleted."""
    installation.helm("upgrade", team_cpu="500m")
    run = installation.place.run("queued", schedule={"queue": "gpu"}, hyperparameters={"steps": 100_000})
    run.wait("Queued", seconds=SECONDS)
    installation.helm("upgrade", team_cpu="1")
    return run


def test_a_run_waits_for_its_teams_quota_and_trains_when_an_upgrade_raises_it(admitted: ClusterRun) -> None:
    assert training(admitted, 1)["progress"]["totalSteps"] == 100_000
    assert {pod["spec"]["nodeName"] for pod in admitted.pods()} == {"node1", "node2"}


def test_the_other_replica_takes_a_run_over_when_the_leader_is_drained(
    installation: Installation, admitted: ClusterRun
) -> None:
    """What this one has begun; the next test's run is its own from the first moment to the last."""
    training(admitted, 1)
    leader = installation.leader()
    installation.cluster.kubectl("delete", "pod", leader, f"--namespace={SYSTEM}", "--wait=false")
    until(lambda: installation.leader() not in ("", leader), "another leader")
    told = admitted.status()["progress"]["step"]
    until(lambda: admitted.status()["progress"]["step"] > told, "news from the other replica")
    status = admitted.status()
    assert (status["attempt"], status["restarts"]["counted"]) == (1, 0)
    assert len(admitted.objects("jobsets")) == 1
    until(lambda: len(installation.replicas()) == 2, "a replica in place of the deleted one")
    admitted.delete()
    until(lambda: admitted.objects() == [], "everything to go")


def test_the_demo_is_applied_and_trains_on_two_nodes(
    installation: Installation, store: S3Server, tmp_path: Path
) -> None:
    """The file of the examples as it is, by kubectl: from buckets, sharded, to a LoRA that stock diffusers loads."""
    demo = REPOSITORY / "examples" / "demo"
    ink = ["--inks", "red", "--count", "24", "--mix", "black,blue"]
    subprocess.run([sys.executable, str(demo / "digits.py"), str(tmp_path), *ink], check=True)
    store.upload(tmp_path, "pictures", "demo")
    store.upload(demo / "base", "models", "demo")
    file = REPOSITORY / "examples" / "cluster" / "demo.yaml"
    installation.cluster.kubectl("apply", "-f", str(file), f"--namespace={TEAM}")
    run, phases = ClusterRun(installation.cluster, TEAM, "demo"), []

    def ended() -> bool:
        phase = run.status().get("phase")
        if phase is not None and phase not in phases:
            phases.append(phase)
        return phase in ("Succeeded", "Failed")

    until(ended, "the demo to end", SECONDS)
    status = run.status()
    assert "Running" in phases
    assert phases[-1] == "Succeeded", status
    assert (status["plan"]["strategy"], status["plan"]["worldSize"]) == ("fsdp2", 2)
    assert {pod["spec"]["nodeName"] for pod in run.objects("pods")} == {"node1", "node2"}
    weights = assert_a_lora_of_all_steps(run, store, 20)
    assert "transformer" in stock_diffusers_loads(demo / "base", weights)


def test_uninstalling_leaves_the_crds_the_runs_and_what_they_train(installation: Installation, store: S3Server) -> None:
    run = installation.place.run("kept", hyperparameters={"steps": 40})
    training(run, 1)
    installation.cluster.helm("uninstall", "atelier", f"--namespace={SYSTEM}", "--wait")
    assert installation.replicas() == []
    crds = (each["metadata"]["name"] for each in installation.cluster.get("crd")["items"])
    assert len([name for name in crds if name.endswith(".atelier.dev")]) == 3
    until(lambda: ended(run) == "Completed", "the pods to end without an operator", SECONDS)
    assert run.status()["phase"] == "Running", "nobody was there to say so"
    assert_a_lora_of_all_steps(run, store, 40)


def ended(run: ClusterRun) -> str:
    (jobset,) = run.objects("jobsets")
    return str(jobset.get("status", {}).get("terminalState") or "")
