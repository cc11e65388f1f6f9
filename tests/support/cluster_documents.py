"""Manifests for tests on a cluster: a profile, runs, queues."""

import copy
from typing import Any

from runs import merged

Object = dict[str, Any]

PROFILE: Object = {
    "apiVersion": "atelier.dev/v1alpha1",
    "kind": "ClusterTrainingProfile",
    "metadata": {"name": "default"},
    "spec": {
        "image": "registry.invalid/atelier/runtime:test",
        "gpuClasses": [{"name": "fake-80g", "memory": "80Gi"}],
        "resources": {"cpu": "100m", "memory": "64Mi", "sharedMemory": "16Mi"},
    },
}

RUN: Object = {
    "apiVersion": "atelier.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "run"},
    "spec": {
        "model": {"family": "sd3", "source": "/models/base"},
        "data": {"sources": [{"uri": "s3://bucket/pictures"}]},
        "hyperparameters": {"steps": 10, "globalBatchSize": 4},
        "parallelism": {"nodes": 2, "gpusPerNode": 1},
        "storage": {"uri": "s3://bucket/runs"},
        "schedule": {"terminationGraceSeconds": 5},
        "retry": {"backoffSeconds": 0},
    },
}


def run_document(namespace: str, name: str, **spec: Any) -> Object:
    """A run with parts of its spec changed."""
    document = merged(copy.deepcopy(RUN), {"spec": spec})
    document["metadata"] = {"name": name, "namespace": namespace}
    return document


def queues(namespace: str, gpus: int, *, name: str | None = None) -> list[Object]:
    """A LocalQueue `gpu` of the namespace with a quota of GPUs, and what stands behind it in Kueue."""
    name = name or namespace
    api = "kueue.x-k8s.io/v1beta1"
    quota = [{"name": "nvidia.com/gpu", "nominalQuota": gpus}]
    for resource, amount in (("cpu", "100"), ("memory", "1000Gi")):
        quota.append({"name": resource, "nominalQuota": amount})
    group = {
        "coveredResources": [each["name"] for each in quota],
        "flavors": [{"name": name, "resources": quota}],
    }
    return [
        {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": name}},
        {
            "apiVersion": api,
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {
                "namespaceSelector": {},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [group],
            },
        },
        {
            "apiVersion": api,
            "kind": "LocalQueue",
            "metadata": {"name": "gpu", "namespace": namespace},
            "spec": {"clusterQueue": name},
        },
    ]


def resource_quota(namespace: str, gpus: int) -> Object:
    """The namespace's GPUs where there is no Kueue."""
    hard = {"requests.nvidia.com/gpu": str(gpus)}
    metadata = {"name": "gpus", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}}
