"""A few training steps of a tiny denoiser, the way the trainer does them, for comparing strategies. Runs in every rank."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.adapter import BoftAdapter, FullAdapter, LokrAdapter, LoraAdapter
from atelier_api.v1alpha1.hyperparameters import Ema, Hyperparameters, Optimizer
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import adapters, components, parallel
from atelier_runtime.denoisers import Denoisers, gathered_weights
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Family, Features
from atelier_runtime.objectives import build_objective
from atelier_runtime.parallel.wrap import blocks_of
from atelier_runtime.train_state import State
from atelier_runtime.trainer import build_state
from family_cases import Case as FamilyCase

STEPS = 3
GLOBAL_BATCH = 4
ADAPTERS: dict[str, Any] = {
    "lora": LoraAdapter(rank=4, targets=["all"]),
    "full": FullAdapter(type="full"),
    "lokr": LokrAdapter(type="lokr", factor=4, targets=["all"]),
    "boft": BoftAdapter(type="boft", block_size=16, targets=["all"]),
}


@dataclass(frozen=True)
class Samples:
    """What a denoiser trains on, one for each slot of the global batch: latents, features of captions, frames and references shown."""

    latents: Tensor
    text: Sequence[Features]
    sizes: Tensor
    frames: Features | None
    references: tuple[Tensor, ...]
    shared: Features

    def conditions(self, family: Family, slots: range) -> Conditions:
        rows = list(slots)
        return Conditions(
            text=family.collate_text([self.text[slot] for slot in slots]),
            sizes=self.sizes[rows],
            frames=None if self.frames is None else {name: tensor[rows] for name, tensor in self.frames.items()},
            references=tuple(reference[rows] for reference in self.references),
            shared=self.shared,
        )


@dataclass(frozen=True)
class Case:
    """One way to train. `folder` holds a tiny checkpoint; `weight` is what gradients are multiplied with."""

    family: str
    adapter: str
    folder: Path
    samples: Samples | None = None
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulation: int = 1
    experts: int = 1
    weight: float = 1.0

    @property
    def name(self) -> str:
        recompute = "recompute" if self.checkpointing else "keep"
        experts = f" {self.experts} experts" if self.experts > 1 else ""
        weight = "" if self.weight == 1 else f" times {self.weight:g}"
        return (
            f"{self.family} {self.adapter} {self.precision} {self.optimizer} {recompute} x{self.accumulation}"
            f"{experts}{weight}"
        )


@dataclass(frozen=True)
class Trained:
    """What came of a case. `losses` are global means; `drawn` is the prediction with the average put in, before the last step."""

    losses: list[float]
    norms: list[float]
    drawn: Tensor
    before: dict[str, Tensor]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    local_elements: int
    reduced_elements: int
    dtypes_in_a_block: set[str]


def plan_of(strategy: str, world: int, case: Case) -> ExecutionPlan:
    return ExecutionPlan(
        strategy=strategy,
        device="cpu",
        nodes=1,
        processes_per_node=world,
        micro_batch_size=GLOBAL_BATCH // (world * case.accumulation),
        gradient_accumulation=case.accumulation,
        gradient_checkpointing=case.checkpointing,
        learning_rate=1e-2,
        threads_per_process=1,
        predicted_peak_memory_bytes=0,
    )


def train_all(strategies: Sequence[str], world: int, cases: Sequence[Case]) -> dict[tuple[str, str], Trained | str]:
    """Every case under every strategy, by (strategy, case name); a traceback in place of what failed."""
    parallel.start(plan_of(strategies[0], world, cases[0]))
    results: dict[tuple[str, str], Trained | str] = {}
    try:
        for strategy in strategies:
            for case in cases:
                try:
                    results[strategy, case.name] = train(strategy, case)
                except Exception:
                    results[strategy, case.name] = traceback.format_exc()
    finally:
        parallel.stop()
    return results


class Training:
    """A case under a strategy, before its first step, in an initialised process group."""

    def __init__(self, strategy: str, case: Case) -> None:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        distributed = parallel.Distributed(rank, rank, world, torch.device("cpu"))
        hyperparameters = Hyperparameters(
            steps=STEPS,
            optimizer=Optimizer(type=case.optimizer, epsilon=1e-3),
            gradient_clip=0.5,
            ema=Ema(decay=0.9),
            precision=case.precision,
        )
        self.case, self.rank, self.world = case, rank, world
        self.plan, self.family = plan_of(strategy, world, case), get_family(case.family)
        self.denoisers = _build(case, self.plan, hyperparameters, distributed)
        self.state = build_state(self.denoisers, hyperparameters, self.plan, distributed)
        self._objective = build_objective(Objective(), self.family.facts, components.scheduler_config(case.folder))

    def step(self) -> tuple[float, float]:
        """One optimizer step, of the experts in turn. Gives the global mean of the loss, and the gradient's norm."""
        case, step, size = self.case, self.state.step, self.plan.micro_batch_size
        names = list(self.denoisers.wrapped)
        name = names[step % len(names)]
        wrapped = self.denoisers.wrapped[name]
        share = torch.zeros(())
        for micro in range(case.accumulation):
            first = (micro * self.world + self.rank) * size
            with parallel.micro_batch(wrapped, last=micro == case.accumulation - 1):
                slots = range(first, first + size)
                loss = _losses(case, self.family, wrapped, self._objective, step, slots).sum() / GLOBAL_BATCH
                (loss * self.world * case.weight).backward()
            share += loss.detach()
        torch.distributed.all_reduce(share)
        norm = self.state.update(name, self.plan.learning_rate)
        self.state.step += 1
        return float(share), float(norm)

    def weights(self) -> dict[str, Tensor]:
        """Whole trained weights by full name, on rank 0; empty elsewhere. Collective."""
        gathered = gathered_weights(self.denoisers)
        return {f"{name}.{key}": weight for name, state in gathered.items() for key, weight in state.items()}

    def averages(self) -> dict[str, Tensor]:
        """Whole moving averages by full name. Collective."""
        return {name: _whole(average) for name, average in self.state.tensors()["ema"]["averages"].items()}


def train(strategy: str, case: Case) -> Trained:
    """`STEPS` optimizer steps on fixed latents, in an initialised process group."""
    training = Training(strategy, case)
    model, wrapped = next(iter(training.denoisers.models.values())), next(iter(training.denoisers.wrapped.values()))
    losses, norms, drawn = [], [], torch.empty(0)
    dtypes: set[str] = set()
    for layer in blocks_of(model, training.family)[0].modules():
        layer.register_forward_pre_hook(
            lambda computing, _: dtypes.update(str(p.dtype) for p in computing.parameters(recurse=False))
        )
    before = training.weights()
    for step in range(STEPS):
        if step == STEPS - 1:
            drawn = _draw(case, training.family, model, training.state)
        loss, norm = training.step()
        losses.append(loss)
        norms.append(norm)
    return Trained(
        losses, norms, drawn, before, training.weights(), training.averages(),
        local_elements=sum(_local(p).numel() for p in model.parameters()),
        reduced_elements=_reduced_elements(wrapped),
        dtypes_in_a_block=dtypes,
    )  # fmt: skip


def _build(
    case: Case, plan: ExecutionPlan, hyperparameters: Hyperparameters, distributed: parallel.Distributed
) -> Denoisers:
    family = get_family(case.family)
    trained_dtype = torch.bfloat16 if case.optimizer == "adamw-bf16" else torch.float32
    frozen_dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    base_dtype = trained_dtype if case.adapter == "full" else frozen_dtype
    models, wrapped = {}, {}
    for expert in range(case.experts):
        name = f"expert{expert}"
        model = components.load_denoiser(case.folder, family.denoisers[0], base_dtype, distributed.device)
        torch.manual_seed(3 + distributed.rank + 10 * expert)  # ranks draw different adapters: those of rank 0 must win
        adapters.install(model, ADAPTERS[case.adapter], family, dtype=trained_dtype)
        models[name] = model
        wrapped[name] = parallel.wrap(model, plan, family, distributed, hyperparameters=hyperparameters)
    return Denoisers(models, wrapped, ())


def _losses(case: Case, family: Family, wrapped: nn.Module, objective: Any, step: int, slots: range) -> Tensor:
    assert case.samples is not None
    generators = [torch.Generator().manual_seed(1000 * step + slot) for slot in slots]
    stage = family.stages(components.read_pipeline_config(case.folder), family.denoisers[:1])[0]
    prepared = objective.prepare(case.samples.latents[list(slots)], generators, stage=stage, tokens=16)
    conditions = case.samples.conditions(family, slots)
    prediction = _predict(case, family, wrapped, prepared.noisy, prepared.time, conditions)
    return objective.loss(prediction, prepared, family.loss_mask(prediction, conditions))


def _predict(
    case: Case, family: Family, wrapped: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
        return family.predict(wrapped, noisy, time, conditions)


def _draw(case: Case, family: Family, model: nn.Module, state: State) -> Tensor:
    """A prediction by the average, on all ranks alike, as sampling does it between two steps: not by way of the strategy."""
    assert case.samples is not None
    steps = family.facts.objective == "diffusion" and family.facts.noise_schedule == "betas"
    time = torch.tensor([500]) if steps else torch.tensor([0.5])
    conditions = case.samples.conditions(family, range(1))
    with state.averaged(), torch.no_grad():
        return _predict(case, family, model, case.samples.latents[1:2], time, conditions).float()


def _local(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def _reduced_elements(wrapped: nn.Module) -> int:
    """Elements whose gradients DDP sums over the ranks, by its own account."""
    if not isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        return 0
    size = next(p.element_size() for p in wrapped.parameters() if p.requires_grad and not hasattr(p, "to_local"))
    return int(wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]) // size


def samples_of(tiny: FamilyCase, captions: Sequence[str]) -> Samples:
    """Real pictures or clips for captions as many as the slots, with what the family shows its denoiser beside them."""
    numbers = list(range(len(captions)))
    references = [tiny.references(number) for number in numbers]
    told = tiny.conditions(captions)
    return Samples(
        latents=tiny.latents(len(captions)),
        text=tiny.features(captions, references),
        sizes=told.sizes,
        frames=told.frames,
        references=told.references,
        shared=told.shared,
    )
