"""Runs that really train on a cluster: two kubelets, pods of a security team's liking, gloo between them, a real S3 server, and the
operator as the chart installs it.

The training pods see the tested virtual environment read-only; nothing else differs from the runtime image. A start of a gang imports
for twenty CPU seconds, so one run is disturbed by one test after another, and goes on for the next.
"""

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from chart_release import ACCOUNT, SYSTEM
from cluster.daemons import ClusterError
from cluster_documents import run_document
from cluster_training import (
    REPOSITORY,
    SECONDS,
    Place,
    assert_a_lora_of_all_steps,
    committed,
    committed_below,
    default_profile,
    history,
    history_below,
    in_store,
    profile,
    stock_diffusers_loads,
    training,
)
from installation import TEAM, Installation
from operator_process import ClusterRun, until
from s3_server import S3Server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures", "cluster_training", "installation")

Object = dict[str, Any]


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


NOBODY_HAS = {"image": "localhost/nobody/has:this"}
NEEDS = {
    "an image": (NOBODY_HAS, {}, "ImagePull", "ErrImageNeverPull"),
    "a Secret": (
        {},
        {"storage": {"credentialsRef": {"name": "nobody"}}},
        "ContainerNotCreated",
        'secret "nobody" not found',
    ),
}


@pytest.mark.parametrize(("other", "spec", "reason", "words"), NEEDS.values(), ids=NEEDS)
def test_a_pod_that_lacks_something_says_what(
    installation: Installation, other: Object, spec: Object, reason: str, words: str
) -> None:
    run = with_a_profile(installation.place, other, "lacks", **spec)
    until(lambda: run.condition("Scheduled").get("reason") == reason, f"the reason {reason}", SECONDS)
    condition = run.condition("Scheduled")
    assert condition["status"] == "False"
    assert words in condition["message"]
    run.delete()
    until(lambda: run.objects() == [], "everything to go", SECONDS)


def with_a_profile(place: Place, other: Object, name: str, **spec: Any) -> ClusterRun:
    """A run with a profile of its namespace, which has `other` keys than the default."""
    document = default_profile(profile(place.base) | other)
    document |= {"kind": "TrainingProfile", "metadata": {"name": "own", "namespace": place.namespace}}
    place.cluster.apply(document)
    return place.run(name, profileRef={"kind": "TrainingProfile", "name": "own"}, **spec)


@pytest.fixture(scope="module")
def lasting(installation: Installation) -> ClusterRun:
    """A run that has waited for its team's quota until an upgrade raised it to room for this one, and trains until the last test."""
    run = installation.place.run(
        "lasting",
        # A namespace waits for half of the grace before it looks again whether its pods have gone.
        schedule={"queue": "gpu", "terminationGraceSeconds": 30},
        hyperparameters={"steps": 100_000},
        storage={"checkpoint": {"everySteps": 5}},
    )
    run.wait("Queued", seconds=SECONDS)
    installation.helm("upgrade", team_cpu="1")
    return run


def test_a_run_waits_for_its_teams_quota_and_trains_when_an_upgrade_raises_it(lasting: ClusterRun) -> None:
    assert training(lasting, 1)["progress"]["totalSteps"] == 100_000
    assert {pod["spec"]["nodeName"] for pod in lasting.pods()} == {"node1", "node2"}


def test_the_other_replica_takes_a_run_over_when_the_leader_is_drained(
    installation: Installation, lasting: ClusterRun
) -> None:
    """What this one has begun; the tests below look at what the other one does then."""
    training(lasting, 1)
    leader = installation.leader()
    installation.cluster.kubectl("delete", "pod", leader, f"--namespace={SYSTEM}", "--wait=false")
    until(lambda: installation.leader() not in ("", leader), "another leader")
    told = lasting.status()["progress"]["step"]
    until(lambda: lasting.status()["progress"]["step"] > told, "news from the other replica")
    status = lasting.status()
    assert (status["attempt"], status["restarts"]["counted"]) == (1, 0)
    assert len(lasting.objects("jobsets")) == 1
    until(lambda: len(installation.replicas()) == 2, "a replica in place of the deleted one")


@pytest.fixture
def run(lasting: ClusterRun, store: S3Server) -> ClusterRun:
    """The lasting run, which trains, with one more checkpoint."""
    training(lasting, 1)
    known = committed(lasting, store)
    until(lambda: committed(lasting, store)[-1:] > known[-1:], "a checkpoint", SECONDS)
    return lasting


def test_a_killed_rank_restarts_the_gang_and_the_run_goes_on_from_its_checkpoint(
    run: ClusterRun, store: S3Server
) -> None:
    before = run.status()
    kill = (
        "import os, signal, pathlib\n"
        "for each in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    words = each.read_bytes().split(b'\\0')\n"
        "    if b'atelier_runtime.rank' in words and b'atelier_runtime.torchrun' not in words:\n"
        "        os.kill(int(each.parent.name), signal.SIGKILL)\n"
    )
    victim = run.pods()[1]["metadata"]["name"]
    run.cluster.kubectl("exec", victim, "-n", run.namespace, "--", "python3", "-c", kill)
    counted = before["restarts"]["counted"] + 1
    status = until(lambda: s if (s := run.status())["restarts"]["counted"] == counted else None, "the restart", SECONDS)
    assert status["attempt"] == before["attempt"]
    goes_on(run, store, committed(run, store)[-1])


def test_a_drained_node_gives_its_part_of_the_gang_away(run: ClusterRun, store: S3Server) -> None:
    """To a drain the pod of rank 0 is what it is to somebody who deletes it."""
    before, pods = run.status(), run.pods()
    lives, drained = {pod["metadata"]["uid"] for pod in pods}, pods[0]["spec"]["nodeName"]
    selector = f"--pod-selector=atelier.dev/run={run.name}"
    try:
        run.cluster.kubectl("drain", drained, selector, "--delete-emptydir-data", "--timeout=120s")
        until(
            lambda: len(run.pods()) == 2 and not lives & {pod["metadata"]["uid"] for pod in run.pods()},
            "a new gang",
            SECONDS,
        )
        assert {pod["spec"]["nodeName"] for pod in run.pods()} == {"node1", "node2"} - {drained}
        status = goes_on(run, store, committed(run, store)[-1])
        assert status["restarts"]["counted"] == before["restarts"]["counted"], (
            "a stop with a checkpoint is nobody's fault"
        )
    finally:
        run.cluster.kubectl("uncordon", drained)


def test_preemption_commits_a_checkpoint_and_the_run_goes_on_from_that_step(
    installation: Installation, run: ClusterRun, store: S3Server
) -> None:
    """The run of the higher priority has to have the room, and not to train: no node has its image. The other one is stopped while
    it waits for room, and resumed when there is some."""
    before = run.status()
    schedule, one = {"queue": "gpu", "priority": "high"}, {"nodes": 1}
    high = with_a_profile(installation.place, NOBODY_HAS, "high", schedule=schedule, parallelism=one)
    run.wait("Suspended", "Preempted", seconds=SECONDS)
    until(lambda: high.condition("Scheduled").get("reason") == "ImagePull", "the other run to have the room", SECONDS)
    until(lambda: run.objects("pods") == [], "the pods to go", SECONDS)
    left_at = committed(run, store)[-1]
    assert max(history(run, store)) == left_at - 1, "steps after the last checkpoint were lost"
    run.patch({"schedule": {"suspend": True}})
    run.wait("Suspended", "Requested", seconds=SECONDS)
    high.delete()
    run.patch({"schedule": {"suspend": False}})
    status = goes_on(run, store, left_at)
    assert (status["attempt"], status["restarts"]["counted"]) == (before["attempt"] + 1, before["restarts"]["counted"])


def goes_on(run: ClusterRun, store: S3Server, step: int) -> dict[str, Any]:
    """The status once the run has trained on from a checkpoint of this step, none left out."""
    status = training(run, max(step, run.status()["progress"]["step"]) + 1)
    steps = sorted(history(run, store))  # read once: the run goes on
    assert steps == list(range(len(steps))), "a step was lost"
    return dict(status)


def test_deleting_a_namespace_deletes_everything(installation: Installation, run: ClusterRun, store: S3Server) -> None:
    """Of a run that trains, whose pods commit a last checkpoint. Nothing holds it up, and the operator does not go on trying there."""
    assert len(run.pods()) == 2
    left = in_store(run, store)
    run.cluster.kubectl("delete", "namespace", TEAM, f"--timeout={SECONDS:.0f}s")
    assert max(history_below(left)) == committed_below(left)[-1] - 1, "steps after the last checkpoint were lost"
    asked = installation.tried(TEAM)
    assert asked
    time.sleep(5)
    assert installation.tried(TEAM) == asked


@dataclass(frozen=True)
class Demo:
    """The run of the demo, and what was seen of it before its end was told."""

    run: ClusterRun
    replicas: list[Object]
    crds: list[str]
    phase: str


@pytest.fixture(scope="module")
def demo(installation: Installation, store: S3Server, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The file of the examples as it is, by kubectl. While its pods trained the chart was not there: it was uninstalled when they had
    begun, and installed again when they had done their work."""
    folder, pictures, cluster = REPOSITORY / "examples" / "demo", tmp_path_factory.mktemp("ink"), installation.cluster
    ink = ["--inks", "red", "--count", "24", "--mix", "black,blue"]
    subprocess.run([sys.executable, str(folder / "digits.py"), str(pictures), *ink], check=True)
    store.upload(pictures, "pictures", "demo")
    store.upload(folder / "base", "models", "demo")
    place = Place.make(cluster, "demo", store, base)
    file = REPOSITORY / "examples" / "cluster" / "demo.yaml"
    cluster.kubectl("apply", "-f", str(file), f"--namespace={place.namespace}")
    run = ClusterRun(cluster, place.namespace, "demo")
    until(lambda: run.status().get("progress"), "a first word from the pods", SECONDS)
    cluster.helm("uninstall", "atelier", f"--namespace={SYSTEM}", "--wait")
    replicas, names = installation.replicas(), [each["metadata"]["name"] for each in cluster.get("crd")["items"]]
    until(lambda: ended(run) == "Completed", "the pods to end without an operator", SECONDS)
    seen = Demo(run, replicas, [name for name in names if name.endswith(".atelier.dev")], run.status()["phase"])
    installation.helm("install", team_cpu=None)
    return seen


def ended(run: ClusterRun) -> str:
    (jobset,) = run.objects("jobsets")
    return str(jobset.get("status", {}).get("terminalState") or "")


def test_uninstalling_leaves_the_crds_the_runs_and_what_they_train(demo: Demo, store: S3Server) -> None:
    assert demo.replicas == []
    assert len(demo.crds) == 3
    assert demo.phase in ("Preparing", "Running"), "nobody was there to say so"
    assert_a_lora_of_all_steps(demo.run, store, 20)


def test_the_operator_may_be_away_while_a_run_ends(demo: Demo) -> None:
    status = demo.run.wait("Succeeded", seconds=SECONDS)
    assert (status["attempt"], status["restarts"]["counted"]) == (1, 0)
    assert [status["progress"][name] for name in ("step", "totalSteps", "percent")] == [20, 20, 100]


def test_a_run_trains_on_two_nodes_and_leaves_a_lora_that_stock_diffusers_loads(demo: Demo, store: S3Server) -> None:
    """From buckets, sharded."""
    run = demo.run
    status = run.wait("Succeeded", seconds=SECONDS)
    nodes = {pod["spec"]["nodeName"] for pod in run.objects("pods")}
    assert nodes == {"node1", "node2"}
    assert status["plan"] | {"predictedPeakMemoryBytes": 0} == status["plan"] | {
        "backend": "jobset",
        "strategy": "fsdp2",
        "worldSize": 2,
        "predictedPeakMemoryBytes": 0,
    }
    weights = assert_a_lora_of_all_steps(run, store, 20)
    assert load_file(weights)
    published = {each["uri"].removeprefix(status["storeUri"] + "/"): each["sha256"] for each in status["artifacts"]}
    assert (
        published["exports/diffusers/pytorch_lora_weights.safetensors"]
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    assert "transformer" in stock_diffusers_loads(REPOSITORY / "examples" / "demo" / "base", weights)
