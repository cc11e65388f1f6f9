"""Fake GPU nodes by kwok: pods on them are scheduled and become Running, and end when their annotations say so.

An annotated pod template (all values are strings):
    sim/run-for: 20s      ends after this time; without it the pod stays Running. A duration with its unit: a bare number means 1 s
    sim/exit-code: "75"   ends as Failed with this exit code; without it as Succeeded
    sim/message: text     the termination message that goes with the exit code
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.certificates import Certificates
from cluster.daemons import Daemons
from cluster.programs import KWOK_MODULE, program, published

GPUS_PER_NODE = 8
_NODE_ANNOTATION = {"kwok.x-k8s.io/node": "fake"}

# A config with options loses kwok's defaults, so the parallelism must be given. Nodes without leases: a kwok that is restarted
# otherwise leaves the pods alone for minutes, until the leases of the one before have run out.
_OPTIONS = {
    "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
    "kind": "KwokConfiguration",
    "options": {
        "manageAllNodes": False,
        "manageNodesWithAnnotationSelector": "kwok.x-k8s.io/node=fake",
        "nodeLeaseDurationSeconds": 0,
        "nodeLeaseParallelism": 4,
        "podPlayStageParallelism": 8,
        "nodePlayStageParallelism": 8,
        "cidr": "10.99.0.0/16",
    },
}
_STAGES = ("node/fast/node-initialize", "node/heartbeat/node-heartbeat", "pod/fast/pod-ready", "pod/fast/pod-delete")


def start_kwok(daemons: Daemons, certificates: Certificates, port: int) -> None:
    """Start kwok; returns when it is healthy."""
    config = daemons.state / "kwok.yaml"
    config.write_text(yaml.safe_dump_all([_OPTIONS, *_stages(published(KWOK_MODULE))]))
    access = [f"--kubeconfig={certificates.kubeconfig('admin')}", f"--server-address=127.0.0.1:{port}"]
    daemons.start("kwok", [str(program("kwok")), *access, f"--config={config}"])
    daemons.wait_until("kwok", lambda: daemons.network.answers(f"http://127.0.0.1:{port}/healthz"))


def fake_nodes(count: int, gpus: int = GPUS_PER_NODE) -> list[dict[str, Any]]:
    """Manifests of `count` nodes fake-000 … with the label type=kwok, over four zones."""
    return [_fake_node(number, gpus) for number in range(count)]


def _fake_node(number: int, gpus: int) -> dict[str, Any]:
    name = f"fake-{number:03}"
    resources = {"cpu": "32", "memory": "256Gi", "pods": "110", "nvidia.com/gpu": str(gpus)}
    labels = {"type": "kwok", "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": f"z{number % 4}"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": _NODE_ANNOTATION, "labels": labels},
        "status": {"allocatable": resources, "capacity": resources, "phase": "Running"},
    }


def _stages(folder: Path) -> Iterator[dict[str, Any]]:
    for name in _STAGES:
        yield yaml.safe_load((folder / f"{name}.yaml").read_text())
    complete = yaml.safe_load((folder / "pod" / "fast" / "pod-complete.yaml").read_text())
    yield from _ending_stages(complete)


def _ending_stages(published_stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The published stage ends every Job's pod at once; these two end those that are annotated, after the annotated time."""
    run_for = '.metadata.annotations["sim/run-for"]'
    exit_code = '.metadata.annotations["sim/exit-code"]'
    complete = copy.deepcopy(published_stage)
    spec = complete["spec"]
    conditions = [found for found in spec["selector"]["matchExpressions"] if "ownerReferences" not in found["key"]]
    spec["selector"]["matchExpressions"] = [*conditions, {"key": run_for, "operator": "Exists"}]
    spec["delay"] = {"durationMilliseconds": 1000, "durationFrom": {"expressionFrom": run_for}}
    fail = copy.deepcopy(complete)
    fail["metadata"]["name"] = "pod-fail"
    spec["selector"]["matchExpressions"].append({"key": exit_code, "operator": "DoesNotExist"})
    fail["spec"]["selector"]["matchExpressions"].append({"key": exit_code, "operator": "Exists"})
    status = fail["spec"]["next"]["statusTemplate"]
    code = '{{ index $root.metadata.annotations "sim/exit-code" }}'
    message = '{{ or ( index $root.metadata.annotations "sim/message" ) "" | Quote }}'
    for old, new in (
        ("exitCode: 0", f"exitCode: {code}\n      message: {message}"),
        ("reason: Completed", "reason: Error"),
        ("phase: Succeeded", "phase: Failed"),
    ):
        if old not in status:
            raise RuntimeError(f"the published stage pod-complete of kwok has no {old!r} to replace")
        status = status.replace(old, new)
    fail["spec"]["next"]["statusTemplate"] = status
    return [complete, fail]
