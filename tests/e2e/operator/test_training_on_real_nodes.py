"""Runs that really train on a cluster: two kubelets, pods of a security team's liking, gloo between them, a real S3 server.

The pods see the tested virtual environment read-only; nothing else differs from the runtime image.
"""

import hashlib
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster.images import BASE_IMAGE
from cluster.local import Cluster
from cluster_documents import queues, run_document
from operator_process import ClusterRun, OperatorProcess, checked, install_crds, until
from runs import write_digits
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, running_server
from tiny_families import save_tiny

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures",)

REPOSITORY = Path(__file__).resolve().parents[3]
SECONDS = 300.0
STEPS = 8
Make = Callable[..., ClusterRun]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny("sd3", folder / "base")
    write_digits(folder / "pictures", 8)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)  # for the pods' user
    return folder


@pytest.fixture(scope="module")
def operator(real_cluster: Cluster, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    install_crds(real_cluster)
    real_cluster.apply(profile(base))
    log = tmp_path_factory.mktemp("operator") / "log"
    with checked(real_cluster):
        process = OperatorProcess(real_cluster, log, prefix=real_cluster.inside).start()
        yield process
        process.stop()


def profile(base: Path) -> dict[str, Any]:
    """What an administrator writes for machines that have the runtime on a shared disk instead of in an image."""
    packages = Path(sysconfig.get_path("purelib"))
    folders = {"/opt/python": Path(sys.base_prefix), "/opt/packages": packages, str(base): base}
    folders |= {f"/opt/atelier/{name}": REPOSITORY / name for name in ("crds", "operator", "runtime", "cli")}
    path = ":".join(place for place in folders if place not in ("/opt/python", str(base)))
    environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "LD_LIBRARY_PATH": "/opt/python/lib"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {
        "apiVersion": "atelier.dev/v1alpha1",
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "default"},
        "spec": {
            "image": BASE_IMAGE,
            "imagePullPolicy": "Never",
            "python": f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}",
            "resources": {"cpu": "500m", "memory": "4Gi", "sharedMemory": "256Mi"},
            "environment": [{"name": name, "value": value} for name, value in environment.items()],
            "volumes": [
                {"name": f"v{number}", "mountPath": place, "hostPath": str(folder)}
                for number, (place, folder) in enumerate(folders.items())
            ],
        },
    }


@pytest.fixture
def make(operator: OperatorProcess, store: S3Server, base: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes runs in the test's own namespace, which refuses every pod that is not restricted but for its host folders."""
    cluster = operator.cluster
    namespace = f"t{abs(hash(request.node.nodeid)) % 10**8}"
    cluster.make_namespace(namespace)
    endpoint = f"http://{cluster.share(int(store.url.rsplit(':', 1)[1]))}"
    secret = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "s3", "namespace": namespace},
            "stringData": secret,
        }
    )

    def run(name: str = "run", **spec: Any) -> ClusterRun:
        defaults: dict[str, Any] = {
            "model": {"source": str(base / "base")},
            "adapter": {"rank": 4, "alpha": "8"},
            "data": {"sources": [{"uri": str(base / "pictures")}], "resolution": 32, "maxUpscale": "2"},
            "hyperparameters": {"steps": STEPS, "globalBatchSize": 4, "learningRate": "1e-3", "precision": "fp32"},
            "parallelism": {"nodes": 2, "gpusPerNode": 0},
            "storage": {
                "uri": f"s3://{BUCKET}/runs",
                "s3": {"endpoint": endpoint},
                "credentialsRef": {"name": "s3"},
                "checkpoint": {"everySteps": 2, "everySeconds": 0},
            },
            "schedule": {"terminationGraceSeconds": 60},
        }
        for block, changes in spec.items():
            defaults[block] = {**defaults.get(block, {}), **changes}
        cluster.apply(json.dumps(run_document(namespace, name, **defaults)))
        return ClusterRun(cluster, namespace, name)

    yield run
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def in_store(run: ClusterRun, store: S3Server) -> Path:
    """The run's folder in the bucket."""
    return store.folder / str(run.status()["storeUri"]).removeprefix(f"s3://{BUCKET}/")


def committed(run: ClusterRun, store: S3Server) -> list[int]:
    """Steps of the checkpoints in the store."""
    return sorted(int(path.name[:8]) for path in (in_store(run, store) / "manifests").glob("*.json"))


def training(run: ClusterRun, step: int) -> dict[str, Any]:
    """The status once the run has passed a step."""
    return dict(
        until(
            lambda: (
                s
                if (s := run.status()).get("phase") == "Running" and s.get("progress", {}).get("step", 0) >= step
                else None
            ),
            f"step {step}",
            SECONDS,
        )
    )


def first_checkpoint(run: ClusterRun, store: S3Server) -> None:
    """Wait until the run trains and has committed a checkpoint: on a busy machine its writer is up many seconds later."""
    training(run, 1)
    until(lambda: committed(run, store), "a checkpoint", SECONDS)


def history(run: ClusterRun, store: S3Server) -> dict[int, float]:
    """Loss by step."""
    lines = (in_store(run, store) / "logs" / "history.jsonl").read_text().splitlines()[1:]
    return {int(row[0]): float(row[1]) for row in map(json.loads, lines)}


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
    assert committed(run, store)[-1] == STEPS
    assert len(history(run, store)) == STEPS
    weights = in_store(run, store) / "exports" / "diffusers" / "pytorch_lora_weights.safetensors"
    assert load_file(weights)
    published = {each["uri"].removeprefix(status["storeUri"] + "/"): each["sha256"] for each in status["artifacts"]}
    assert (
        published["exports/diffusers/pytorch_lora_weights.safetensors"]
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    draw = (
        "import sys; from diffusers import StableDiffusion3Pipeline as P; p = P.from_pretrained(sys.argv[1]); "
        "p.load_lora_weights(sys.argv[2]); print(p.get_list_adapters())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", draw, str(base / "base"), str(weights.parent)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "transformer" in shown.stdout


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
