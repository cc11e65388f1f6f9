"""What the planner may choose for a run on a machine, and in which order. Pure.

Order of choice, first that fits: one process or DDP before FSDP2 (DDP is 3 to 6 times faster for LoRA), for each of them no
recompute before recompute (a third of the step), and for each of these the largest micro-batch of at most 8 (a smaller one costs
launches, not arithmetic); for each of these the autoencoder works on whole samples before it works on tiles, which changes no step.
A field that the user has set is taken as it is, and checked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from atelier_api.rules import processes_per_node, world_size
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.adapter import ControlNetAdapter, FullAdapter, Ia3Adapter, TextualInversionAdapter
from atelier_operator.planner.memory import Choice, ModelFacts, Prediction, predict
from atelier_operator.planner.passages import tilings
from atelier_operator.planner.sharding import Strategy

USABLE = 0.94
"""Part of the device memory that a run may use: the rest is lost to fragmentation and to what others hold."""

LARGEST_MICRO_BATCH = 8

ADAPTER_LEARNING_RATE = 1e-4
IA3_LEARNING_RATE = 3e-3
"""That of the paper (arXiv:2205.05638): a factor has to move by tenths where the entry of a matrix moves by thousandths."""

INVERSION_LEARNING_RATE = 5e-4
"""That of diffusers' example of textual inversion."""

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


def fits_of(spec: TrainingRunSpec, model: ModelFacts, machine: Machine) -> Iterator[Fit]:
    """Every choice that the spec leaves open, best first, with what it needs."""
    for choice in _choices(spec, model, machine):
        yield evaluate(spec, model, machine, choice)


def best_fit(spec: TrainingRunSpec, model: ModelFacts, machine: Machine) -> Fit | None:
    """The first choice that fits."""
    return next((fit for fit in fits_of(spec, model, machine) if fit.fits), None)


def evaluate(spec: TrainingRunSpec, model: ModelFacts, machine: Machine, choice: Choice) -> Fit:
    """What one choice needs on the machine."""
    memory = device_memory(spec, machine)
    limit = None if memory is None else int(memory * USABLE)
    return Fit(choice, predict(spec, model, choice, machine.device), limit)


def device_memory(spec: TrainingRunSpec, machine: Machine) -> int | None:
    """Bytes that one process has: its GPU, or its part of the RAM. `spec.parallelism.deviceMemory` goes before what was found."""
    text = spec.parallelism.device_memory
    memory = machine.memory_bytes if text is None else size_bytes(text)
    if memory is None or machine.device == "cuda":
        return memory
    return memory // processes_per_node(spec)


def size_bytes(text: str) -> int:
    """Bytes of a size such as 80Gi or 512Mi."""
    return int(text[:-2]) << {"Mi": 20, "Gi": 30}[text[-2:]]


def learning_rate(spec: TrainingRunSpec) -> float:
    """The peak learning rate."""
    if spec.hyperparameters.learning_rate is not None:
        return spec.hyperparameters.learning_rate
    if isinstance(spec.adapter, FullAdapter | ControlNetAdapter):
        return FULL_LEARNING_RATE
    if isinstance(spec.adapter, TextualInversionAdapter):
        return INVERSION_LEARNING_RATE
    return IA3_LEARNING_RATE if isinstance(spec.adapter, Ia3Adapter) else ADAPTER_LEARNING_RATE


def _choices(spec: TrainingRunSpec, model: ModelFacts, machine: Machine) -> Iterator[Choice]:
    """What the spec leaves open, best first. With unknown memory only the most frugal of the first strategy, and no other latents."""
    world, tiles = world_size(spec), tilings(spec, model.family)
    strategies, recompute, micro_batches = _strategies(spec), _recompute(spec), _micro_batches(spec)
    if device_memory(spec, machine) is None:
        yield Choice(strategies[0], world, micro_batches[-1], recompute[-1], *tiles[0])
        return
    for strategy, checkpointing, micro_batch, tiled in product(strategies, recompute, micro_batches, tiles):
        yield Choice(strategy, world, micro_batch, checkpointing, *tiled)


def _strategies(spec: TrainingRunSpec) -> tuple[Strategy, ...]:
    if spec.parallelism.strategy != "auto":
        return (spec.parallelism.strategy,)
    return ("single",) if world_size(spec) == 1 else ("ddp", "fsdp2")


def _recompute(spec: TrainingRunSpec) -> tuple[bool, ...]:
    given = spec.hyperparameters.gradient_checkpointing
    return (False, True) if given is None else (given,)


def _micro_batches(spec: TrainingRunSpec) -> tuple[int, ...]:
    """Divisors of a process's part of the batch, largest first."""
    if spec.hyperparameters.micro_batch_size is not None:
        return (spec.hyperparameters.micro_batch_size,)
    per_process = spec.hyperparameters.global_batch_size // world_size(spec)
    return tuple(size for size in range(LARGEST_MICRO_BATCH, 0, -1) if per_process % size == 0)
