"""From a run, a model and a machine to an execution plan. Pure.

Order of choice, first that fits: one process or DDP before FSDP2 (DDP is 3 to 6 times faster for LoRA), for each of them no
recompute before recompute (a third of the step), and for each of these the largest micro-batch of at most 8 (a smaller one costs
launches, not arithmetic). A field that the user has set is taken as it is, and checked.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from atelier_api.errors import ConfigError
from atelier_api.rules import processes_per_node, world_size
from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_operator.planner.memory import GIB, Choice, ModelFacts, Prediction, Strategy, predict

USABLE = 0.94
"""Part of the device memory that a run may use: the rest is lost to fragmentation and to what others hold."""

LARGEST_MICRO_BATCH = 8

LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Machine:
    """One node. `memory_bytes` is of one GPU, or the RAM that the processes share on the CPU; None: unknown."""

    device: Literal["cpu", "cuda"]
    count: int
    memory_bytes: int | None
    cores: int


@dataclass(frozen=True)
class Fit:
    """A choice, what it needs, and what it may use. `limit` None: unknown."""

    choice: Choice
    prediction: Prediction
    limit: int | None

    @property
    def fits(self) -> bool:
        return self.limit is None or self.prediction.peak <= self.limit
