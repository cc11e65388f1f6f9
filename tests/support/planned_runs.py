"""Runs and machines for tests of the planner."""

from typing import Any

from atelier_api.read import problems
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import Machine
from run_documents import document


def run(family: str = "flux", **changes: Any) -> TrainingRun:
    """A valid run of the family with values set below `spec`: `run(hyperparameters__globalBatchSize=4)`."""
    adapter = {"type": "lora"} | changes.pop("adapter", {})
    changed = document(**{"model__family": family, "adapter": adapter, **changes})
    assert problems(changed) == []
    return TrainingRun.model_validate(changed)


def gpu(gibibytes: int | None = None, count: int = 1) -> Machine:
    """A node of GPUs."""
    return Machine("cuda", count, None if gibibytes is None else gibibytes << 30, cores=16)


def cpu(gibibytes: int | None = None, cores: int = 8) -> Machine:
    """A node without GPUs."""
    return Machine("cpu", 0, None if gibibytes is None else gibibytes << 30, cores)
