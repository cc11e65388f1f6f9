"""The manifests as a whole, compared with files in `golden/`.

`ATELIER_WRITE_GOLDEN=1 pytest tests/operator/desired/test_golden.py` writes the files anew; look at the difference before you keep it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from atelier_operator.desired import Order, config_map, job, jobset, service
from orders import order

GOLDEN = Path(__file__).parent / "golden"

TOLERANT = {
    "gpuClasses": [
        {
            "name": "h100-80g",
            "memory": "80Gi",
            "nodeSelector": [{"key": "nvidia.com/gpu.product", "value": "H100"}],
            "tolerations": [
                {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
                {"key": "team", "operator": "Equal", "value": "art"},
            ],
        }
    ],
    "environment": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "imagePullSecrets": [{"name": "registry"}],
    "volumes": [{"name": "models", "mountPath": "/models", "persistentVolumeClaim": "models"}],
    "resources": {"cpu": "8", "memory": "64Gi", "ephemeralStorage": "200Gi", "sharedMemory": "16Gi"},
}
SECRETS = {
    "storage": {"uri": "s3://bucket/runs", "credentialsRef": {"name": "runs-rw"}},
    "model": {"source": "hf://owner/name", "credentialsRef": {"name": "hf-token"}},
}

FILES: dict[str, tuple[Callable[[Order], dict[str, Any] | None], Order]] = {
    "jobset-gpus-network": (
        jobset,
        order(
            profile=TOLERANT,
            queue="gpu",
            parallelism={"network": "infiniband"},
            schedule={"priority": "high", "terminationGraceSeconds": 60},
            **SECRETS,
        ),
    ),
    "jobset-excluded-nodes": (jobset, order(attempt=3, restarts_left=1, excluded_nodes=("gpu-17", "gpu-4"))),
    "job-fallback": (job, order(backend="job", schedule={"priority": "high"})),
    "job-cpu": (job, order(backend="job", parallelism={"nodes": 1, "gpusPerNode": 0})),
    "config-map": (config_map, order()),
    "service": (service, order(backend="job")),
}


@pytest.mark.parametrize(("build", "of"), FILES.values(), ids=FILES)
def test_the_manifest_is_the_golden_one(
    build: Callable[[Order], dict[str, Any] | None], of: Order, request: pytest.FixtureRequest
) -> None:
    path = GOLDEN / f"{request.node.callspec.id}.yaml"
    manifest = build(of)
    if os.environ.get("ATELIER_WRITE_GOLDEN"):
        path.write_text(yaml.safe_dump(manifest, sort_keys=False, width=120))
    assert manifest == yaml.safe_load(path.read_text())


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(FILES)
