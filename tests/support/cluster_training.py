"""Runs that really train in pods of real nodes, with a real S3 server, and what they leave there.

A test module takes the fixtures `store` and `base` with `pytest_plugins = ("cluster_fixtures", "cluster_training")`.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusion3Pipeline

from cluster.images import BASE_IMAGE
from cluster.local import Cluster
from cluster_documents import run_document
from family_models import save_tiny
from operator_process import ClusterRun, until
from runs import merged, write_digits
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, running_server

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 300.0
STEPS = 8

Object = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model `base` and `pictures`, for the pods to mount."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny("sd3", folder / "base")
    write_digits(folder / "pictures", 8)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)  # for the pods' user
    return folder


def profile(base: Path) -> Object:
    """What an administrator writes for machines that have the runtime on a shared disk instead of in an image."""
    packages = Path(sysconfig.get_path("purelib"))
    folders = {"/opt/python": Path(sys.base_prefix), "/opt/packages": packages, str(base): base}
    folders |= {f"/opt/atelier/{name}": REPOSITORY / name for name in ("crds", "operator", "runtime", "cli")}
    path = ":".join(place for place in folders if place not in ("/opt/python", str(base)))
    environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "LD_LIBRARY_PATH": "/opt/python/lib"}
    python = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return profile_of_image(BASE_IMAGE, folders, environment) | {"python": python}


def profile_of_image(image: str, folders: dict[str, Path], environment: dict[str, str] | None = None) -> Object:
    """The spec of a profile with an image that the nodes have, and folders of the machine that its pods see, by their place there."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environment or {})
    return {
        "image": image,
        "imagePullPolicy": "Never",
        "resources": {"cpu": "500m", "memory": "4Gi", "sharedMemory": "256Mi"},
        "environment": [{"name": name, "value": value} for name, value in environment.items()],
        "volumes": [
            {"name": f"v{number}", "mountPath": place, "hostPath": str(folder)}
            for number, (place, folder) in enumerate(folders.items())
        ],
    }


def default_profile(spec: Object) -> Object:
    return {
        "apiVersion": "atelier.dev/v1alpha1",
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "default"},
        "spec": spec,
    }


@dataclass(frozen=True)
class Place:
    """A namespace with the store's credentials, to train in."""

    cluster: Cluster
    namespace: str
    store: S3Server
    base: Path

    @classmethod
    def make(cls, cluster: Cluster, namespace: str, store: S3Server, base: Path) -> "Place":
        cluster.make_namespace(namespace)
        secret = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        metadata = {"name": "s3", "namespace": namespace}
        cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": secret})
        return cls(cluster, namespace, store, base)

    def run(self, name: str = "run", **spec: Any) -> ClusterRun:
        """A run on two nodes, with parts of its spec changed."""
        endpoint = f"http://{self.cluster.share(int(self.store.url.rsplit(':', 1)[1]))}"
        defaults: Object = {
            "model": {"source": str(self.base / "base")},
            "adapter": {"rank": 4, "alpha": "8"},
            "data": {"sources": [{"uri": str(self.base / "pictures")}], "resolution": 32, "maxUpscale": "2"},
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
        self.cluster.apply(json.dumps(run_document(self.namespace, name, **merged(defaults, spec))))
        return ClusterRun(self.cluster, self.namespace, name)


def stock_diffusers_loads(base: Path, weights: Path) -> str:
    """What the stock pipeline of SD3 on `base` says of the adapters that it has after it loaded `weights`."""
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(str(base))
    pipeline.load_lora_weights(str(weights.parent))
    return str(pipeline.get_list_adapters())


def in_store(run: ClusterRun, store: S3Server) -> Path:
    """The run's folder in the bucket."""
    return store.folder / str(run.status()["storeUri"]).removeprefix(f"s3://{BUCKET}/")


def committed(run: ClusterRun, store: S3Server) -> list[int]:
    """Steps of the checkpoints in the store."""
    return committed_below(in_store(run, store))


def committed_below(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder of the bucket."""
    return sorted(int(path.name[:8]) for path in (folder / "manifests").glob("*.json"))


def training(run: ClusterRun, step: int) -> Object:
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
    return history_below(in_store(run, store))


def history_below(folder: Path) -> dict[int, float]:
    """Loss by step, from a run's folder of the bucket."""
    lines = (folder / "logs" / "history.jsonl").read_text().splitlines()[1:]
    return {int(row[0]): float(row[1]) for row in map(json.loads, lines)}


def assert_a_lora_of_all_steps(run: ClusterRun, store: S3Server, steps: int = STEPS) -> Path:
    """What a run that succeeded has left: no step lost, a checkpoint of the last one. Gives the published weights."""
    assert committed(run, store)[-1] == steps
    assert sorted(history(run, store)) == list(range(steps))
    weights = in_store(run, store) / "exports" / "diffusers" / "pytorch_lora_weights.safetensors"
    assert weights.stat().st_size > 0
    return weights
