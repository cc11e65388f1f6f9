"""RunFiles for tests that train nothing."""

from pathlib import Path
from typing import Any

from atelier_api.run_file import ExecutionPlan, RunFile, RunIdentity
from atelier_api.v1alpha1 import TrainingRunSpec


def run_file(scratch: Path, *, nodes: int = 1, processes: int = 1, **spec: Any) -> RunFile:
    """A resolved run on the CPU; `spec` lays whole blocks over the defaults."""
    document = {
        "model": {"family": "sd3", "source": str(scratch)},
        "data": {"sources": [{"uri": str(scratch)}]},
        "hyperparameters": {"steps": 10},
        "storage": {"uri": str(scratch / "store")},
        **spec,
    }
    plan = ExecutionPlan(
        strategy="ddp",
        device="cpu",
        nodes=nodes,
        processes_per_node=processes,
        micro_batch_size=1,
        gradient_accumulation=1,
        gradient_checkpointing=False,
        learning_rate=1e-4,
        threads_per_process=3,
        predicted_peak_memory_bytes=0,
    )
    return RunFile(
        identity=RunIdentity(namespace="default", name="demo", uid="local"),
        spec=TrainingRunSpec.model_validate(document),
        plan=plan,
        model_folder=str(scratch),
        scratch=str(scratch),
        cache_uri=str(scratch / "cache"),
    )
