"""Runs that really train on a cluster: two kubelets, pods of a security team's liking, gloo between them, a real S3 server.

The pods see the tested virtual environment read-only; nothing else differs from the runtime image.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
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
    first_checkpoint,
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


def test_a_run_trains_on_two_nodes_and_leaves_a_lora_that_stock_diffusers_loads(
    make: Make, store: S3Server, base: Path
) -> None:
    run = make(parallelism={"strategy": "fsdp2"})
    status = run.wait("Succeeded", seconds=SECONDS)
    nodes = {pod["spec"]["nodeName"] for pod in run.objects("pods")}
    assert nodes == {"node1", "node2"}
    assert status["plan"] | {"predictedPeakMemoryBytes": 0} == status["plan"] | {
        "backend": "jobset",
        "strategy": "fsdp2",
        "worldSize": 2,
        "predictedPeakMemoryBytes": 0,
    }
    assert status["progress"]["percent"] == 100
    weights = assert_a_lora_of_all_steps(run, store)
    assert load_file(weights)
    published = {each["uri"].removeprefix(status["storeUri"] + "/"): each["sha256"] for each in status["artifacts"]}
    assert (
        published["exports/diffusers/pytorch_lora_weights.safetensors"]
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    assert "transformer" in stock_diffusers_loads(base / "base", weights)


def test_a_killed_rank_restarts_the_gang_and_the_run_goes_on_from_its_checkpoint(make: Make, store: S3Server) -> None:
    run = make(hyperparameters={"steps": 400})
    first_checkpoint(run, store)
    kill = (
        "import os, signal, pathlib\n"
        "for each in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    words = each.read_bytes().split(b'\\0')\n"
        "    if b'atelier_runtime.launch' in words and b'atelier_runtime.torchrun' not in words:\n"
        "        os.kill(int(each.parent.name), signal.SIGKILL)\n"
    )
    victim = run.pods()[1]["metadata"]["name"]
    run.cluster.kubectl("exec", victim, "-n", run.namespace, "--", "python3", "-c", kill)
    status = until(lambda: s if (s := run.status())["restarts"]["counted"] == 1 else None, "the restart", SECONDS)
    assert status["attempt"] == 1
    before = committed(run, store)[-1]
    assert training(run, before)["progress"]["step"] >= before
    steps = sorted(history(run, store))
    assert steps == list(range(len(steps))), "a step was lost"
    run.delete()
    until(lambda: run.objects() == [], "everything to go", SECONDS)


def test_a_deleted_pod_restarts_the_gang(make: Make) -> None:
    run = make(hyperparameters={"steps": 400})
    training(run, 2)
    lives = {pod["metadata"]["uid"] for pod in run.pods()}
    victim = run.pods()[0]["metadata"]["name"]
    run.cluster.kubectl("delete", "pod", victim, "-n", run.namespace, "--wait=false")
    until(
        lambda: len(run.pods()) == 2 and not lives & {pod["metadata"]["uid"] for pod in run.pods()},
        "a new gang",
        SECONDS,
    )
    training(run, 2)
    assert run.status()["restarts"]["counted"] == 0, "a stop with a checkpoint is nobody's fault"


def test_preemption_commits_a_checkpoint_and_the_run_goes_on_from_that_step(make: Make, store: S3Server) -> None:
    low = make("low", schedule={"queue": "gpu"}, hyperparameters={"steps": 400})
    cluster, namespace = low.cluster, low.namespace
    made = queues(namespace, 0)
    made[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"][1]["nominalQuota"] = "1"
    priority = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "WorkloadPriorityClass"}
    cluster.apply([*made, priority | {"metadata": {"name": "high"}, "value": 1000}])
    first_checkpoint(low, store)
    high = make("high", schedule={"queue": "gpu", "priority": "high"})
    low.wait("Suspended", "Preempted", seconds=SECONDS)
    high.wait("Running", seconds=SECONDS)
    left_at = committed(low, store)[-1]
    assert max(history(low, store)) == left_at - 1, "steps after the last checkpoint were lost"
    high.wait("Succeeded", seconds=SECONDS)
    assert training(low, left_at)["restarts"]["counted"] == 0
    steps = sorted(history(low, store))  # read once: the run goes on
    assert steps == list(range(len(steps)))


def test_the_operator_may_be_away_while_a_run_ends(make: Make, operator: OperatorProcess, store: S3Server) -> None:
    run = make()
    until(lambda: len(run.pods()) == 2, "the pods", SECONDS)
    operator.kill()
    until(lambda: run.objects("jobsets")[0].get("status", {}).get("terminalState") == "Completed", "the end", SECONDS)
    operator.start()
    run.wait("Succeeded", seconds=SECONDS)
    assert committed(run, store)[-1] == STEPS


def test_stop_and_resume_lose_no_step(make: Make, store: S3Server) -> None:
    run = make(hyperparameters={"steps": 400})
    first_checkpoint(run, store)
    run.patch({"schedule": {"suspend": True}})
    run.wait("Suspended", "Requested", seconds=SECONDS)
    until(lambda: run.objects("pods") == [], "the pods to go", SECONDS)
    left_at = committed(run, store)[-1]
    assert max(history(run, store)) == left_at - 1
    time.sleep(1)
    run.patch({"schedule": {"suspend": False}})
    assert training(run, left_at)["attempt"] == 2


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


def test_a_drained_node_gives_its_part_of_the_gang_away(make: Make, store: S3Server) -> None:
    run = make(hyperparameters={"steps": 400})
    first_checkpoint(run, store)
    lives = {pod["metadata"]["uid"] for pod in run.pods()}
    drain = ("drain", "node2", f"--pod-selector=atelier.dev/run={run.name}", "--delete-emptydir-data", "--timeout=120s")
    try:
        run.cluster.kubectl(*drain)
        until(
            lambda: len(run.pods()) == 2 and not lives & {pod["metadata"]["uid"] for pod in run.pods()},
            "a new gang",
            SECONDS,
        )
        assert {pod["spec"]["nodeName"] for pod in run.pods()} == {"node1"}
        left_at = committed(run, store)[-1]
        assert training(run, left_at)["restarts"]["counted"] == 0, "a stop with a checkpoint is nobody's fault"
    finally:
        run.cluster.kubectl("uncordon", "node2")
    steps = sorted(history(run, store))
    assert steps == list(range(len(steps))), "a step was lost"


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
