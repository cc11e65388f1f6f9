"""Runs that really train on a cluster: two kubelets, pods of a security team's liking, gloo between them, a real S3 server.

The pods see the tested virtual environment read-only; nothing else differs from the runtime image.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atelier_operator.names import FIELD_MANAGER
from cluster.local import Cluster
from cluster_documents import queues
from cluster_training import (
    SECONDS,
    STEPS,
    Place,
    assert_a_lora_of_all_steps,
    committed,
    default_profile,
    history,
    profile,
    stock_diffusers_loads,
    training,
)
from operator_process import ClusterRun, OperatorProcess, checked, install_crds, until
from s3_server import S3Server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures", "cluster_training")

Make = Callable[..., ClusterRun]


@pytest.fixture(scope="module")
def operator(real_cluster: Cluster, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    install_crds(real_cluster)
    real_cluster.apply(default_profile(profile(base)))
    log = tmp_path_factory.mktemp("operator") / "log"
    with checked(real_cluster):
        process = OperatorProcess(real_cluster, log, prefix=real_cluster.inside).start()
        yield process
        process.stop()


@pytest.fixture
def make(operator: OperatorProcess, store: S3Server, base: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes runs in the test's own namespace, which refuses every pod that is not restricted but for its host folders."""
    cluster = operator.cluster
    namespace = f"t{abs(hash(request.node.nodeid)) % 10**8}"
    yield Place.make(cluster, namespace, store, base).run
    cluster.kubectl("delete", "namespace", namespace, "--ignore-not-found", "--wait=false")


def test_deleting_a_namespace_deletes_everything(make: Make, operator: OperatorProcess) -> None:
    """Nothing holds it up, and the operator does not go on trying there."""
    run = make(hyperparameters={"steps": 400})
    until(lambda: len(run.pods()) == 2, "the pods", SECONDS)
    run.cluster.kubectl("delete", "namespace", run.namespace, f"--timeout={SECONDS:.0f}s")
    asked = tried(operator, run.namespace)
    time.sleep(5)
    assert tried(operator, run.namespace) == asked


def tried(operator: OperatorProcess, namespace: str) -> int:
    """The operator's writes below a namespace, those that were refused among them."""
    found = (each for each in operator.cluster.audit() if each.get("userAgent") == FIELD_MANAGER)
    return sum(f"/namespaces/{namespace}/" in each["requestURI"] and each["verb"] != "get" for each in found)


NEEDS = {
    "an image": ({"image": "localhost/nobody/has:this"}, {}, "ImagePull", "ErrImageNeverPull"),
    "a Secret": (
        {},
        {"storage": {"credentialsRef": {"name": "nobody"}}},
        "ContainerNotCreated",
        'secret "nobody" not found',
    ),
}


@pytest.mark.parametrize(("other", "spec", "reason", "words"), NEEDS.values(), ids=NEEDS)
def test_a_pod_that_lacks_something_says_what(
    make: Make, base: Path, other: dict[str, Any], spec: dict[str, Any], reason: str, words: str
) -> None:
    run = make(profileRef={"kind": "TrainingProfile", "name": "own"}, **spec)
    document = default_profile(profile(base) | other)
    document |= {"kind": "TrainingProfile", "metadata": {"name": "own", "namespace": run.namespace}}
    run.cluster.apply(document)
    until(lambda: run.condition("Scheduled").get("reason") == reason, f"the reason {reason}", SECONDS)
    condition = run.condition("Scheduled")
    assert condition["status"] == "False"
    assert words in condition["message"]
    run.delete()
    until(lambda: run.objects() == [], "everything to go", SECONDS)


@pytest.fixture(scope="module")
def lasting(operator: OperatorProcess, store: S3Server, base: Path) -> Iterator[ClusterRun]:
    """A run of a queue with room for one that trains until the last test: each disturbs it, and it goes on for the next."""
    cluster, namespace = operator.cluster, "lasting"
    place = Place.make(cluster, namespace, store, base)
    made = queues(namespace, 0)
    made[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"][1]["nominalQuota"] = "1"
    priority = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "WorkloadPriorityClass"}
    cluster.apply([*made, priority | {"metadata": {"name": "high"}, "value": 1000}])
    run = place.run(
        schedule={"queue": "gpu"},
        hyperparameters={"steps": 100_000},
        storage={"checkpoint": {"everySteps": 5}},
    )
    yield run
    run.delete()
    until(lambda: run.objects() == [], "everything to go", SECONDS)


@dataclass(frozen=True)
class Preemption:
    """What became of a run that had to make room, and of the run that it made room for."""

    low: ClusterRun
    high: ClusterRun
    left_at: int
    last_step: int
    counted: int


@pytest.fixture(scope="module")
def preemption(lasting: ClusterRun, operator: OperatorProcess, store: S3Server, base: Path) -> Preemption:
    """The operator was killed while the run of the higher priority trained, and came back when its pods had done their work."""
    checkpoint_of_this_life(lasting, store)
    counted = lasting.status()["restarts"]["counted"]
    schedule = {"queue": "gpu", "priority": "high"}
    place = Place(operator.cluster, lasting.namespace, store, base)
    high = place.run("high", schedule=schedule, parallelism={"strategy": "fsdp2"})
    lasting.wait("Suspended", "Preempted", seconds=SECONDS)
    high.wait("Running", seconds=SECONDS)
    made = Preemption(lasting, high, committed(lasting, store)[-1], max(history(lasting, store)), counted)
    operator.kill()
    until(lambda: high.objects("jobsets")[0].get("status", {}).get("terminalState") == "Completed", "the end", SECONDS)
    operator.start()
    high.wait("Succeeded", seconds=SECONDS)
    return made


def test_preemption_commits_a_checkpoint_and_the_run_goes_on_from_that_step(
    preemption: Preemption, store: S3Server
) -> None:
    assert preemption.last_step == preemption.left_at - 1, "steps after the last checkpoint were lost"
    assert goes_on(preemption.low, store, preemption.left_at)["restarts"]["counted"] == preemption.counted


def test_the_operator_may_be_away_while_a_run_ends(preemption: Preemption, store: S3Server) -> None:
    status = preemption.high.status()
    assert (status["phase"], status["attempt"], status["restarts"]["counted"]) == ("Succeeded", 1, 0)
    assert status["progress"]["percent"] == 100
    assert committed(preemption.high, store)[-1] == STEPS


def test_a_run_trains_on_two_nodes_and_leaves_a_lora_that_stock_diffusers_loads(
    preemption: Preemption, store: S3Server, base: Path
) -> None:
    run = preemption.high
    status = run.status()
    nodes = {pod["spec"]["nodeName"] for pod in run.objects("pods")}
    assert nodes == {"node1", "node2"}
    assert status["plan"] | {"predictedPeakMemoryBytes": 0} == status["plan"] | {
        "backend": "jobset",
        "strategy": "fsdp2",
        "worldSize": 2,
        "predictedPeakMemoryBytes": 0,
    }
    weights = assert_a_lora_of_all_steps(run, store)
    assert load_file(weights)
    published = {each["uri"].removeprefix(status["storeUri"] + "/"): each["sha256"] for each in status["artifacts"]}
    assert (
        published["exports/diffusers/pytorch_lora_weights.safetensors"]
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    assert "transformer" in stock_diffusers_loads(base / "base", weights)


@pytest.fixture
def run(lasting: ClusterRun, store: S3Server) -> ClusterRun:
    checkpoint_of_this_life(lasting, store)
    return lasting


def checkpoint_of_this_life(run: ClusterRun, store: S3Server) -> None:
    """Wait until the run trains and has committed one more checkpoint."""
    training(run, 1)
    known = committed(run, store)
    until(lambda: committed(run, store)[-1:] > known[-1:], "a checkpoint", SECONDS)


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


def test_stop_and_resume_lose_no_step(run: ClusterRun, store: S3Server) -> None:
    before = run.status()
    run.patch({"schedule": {"suspend": True}})
    run.wait("Suspended", "Requested", seconds=SECONDS)
    until(lambda: run.objects("pods") == [], "the pods to go", SECONDS)
    left_at = committed(run, store)[-1]
    assert max(history(run, store)) == left_at - 1
    run.patch({"schedule": {"suspend": False}})
    assert goes_on(run, store, left_at)["attempt"] == before["attempt"] + 1


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


def goes_on(run: ClusterRun, store: S3Server, step: int) -> dict[str, Any]:
    """The status once the run has trained on from a checkpoint of this step, none left out."""
    status = training(run, max(step, run.status()["progress"]["step"]) + 1)
    steps = sorted(history(run, store))  # read once: the run goes on
    assert steps == list(range(len(steps))), "a step was lost"
    return dict(status)
