"""A few training steps of a tiny denoiser, the way the trainer does them, for comparing strategies. Runs in every rank."""

import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.quantizations import Quantization
from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.adapter import (
    BoftAdapter,
    DyloraAdapter,
    FullAdapter,
    Ia3Adapter,
    LokrAdapter,
    LoraAdapter,
    TextualInversionAdapter,
)
from atelier_api.v1alpha1.hyperparameters import Hyperparameters, Optimizer
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import adapters, components, parallel
from atelier_runtime.control import Controlled
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Family, Features
from atelier_runtime.objectives import build_objective
from atelier_runtime.optimizers import Ema, build_optimizer, clip_gradients
from atelier_runtime.parallel.wrap import blocks_of
from atelier_runtime.quantization import quantize
from atelier_runtime.trainer import ADAPTER_SLOT, sample_generator
from control_cases import conditions_of
from family_cases import Case as FamilyCase

STEPS = 3
GLOBAL_BATCH = 4
ADAPTERS: dict[str, Any] = {
    "lora": LoraAdapter(rank=4, targets=["all"]),
    "full": FullAdapter(type="full"),
    "lokr": LokrAdapter(type="lokr", factor=4, targets=["all"]),
    "boft": BoftAdapter(type="boft", block_size=16, targets=["all"]),
    "dylora": DyloraAdapter(type="dylora", rank=4, targets=["all"]),
    "textual-inversion": TextualInversionAdapter.model_validate(
        {"type": "textual-inversion", "tokens": [{"token": "<fox>", "initializer": "f", "vectors": 2}]}
    ),
    "ia3": Ia3Adapter(type="ia3", input_targets=["mlp"], targets=["all"]),
}


@dataclass(frozen=True)
class Samples:
    """What a denoiser trains on, one for each slot of the global batch: latents, features of captions, frames and references shown.

    `captions` are for an adapter that trains what reads them.
    """

    latents: Tensor
    text: Sequence[Features]
    sizes: Tensor
    frames: Features | None
    references: tuple[Tensor, ...]
    shared: Features
    captions: Sequence[str]
    control: Tensor | None = None

    def conditions(
        self, family: Family, slots: range, encode: adapters.Encode | None = None, *, controlled: bool = False
    ) -> Conditions:
        rows = list(slots)
        return Conditions(
            text=family.collate_text([self.text[slot] for slot in slots])
            if encode is None
            else encode([f"<fox> {self.captions[slot]}" for slot in slots]),
            sizes=self.sizes[rows],
            frames=None if self.frames is None else {name: tensor[rows] for name, tensor in self.frames.items()},
            references=tuple(reference[rows] for reference in self.references),
            shared=self.shared,
            control=self.control[rows] if controlled and self.control is not None else None,
        )


@dataclass(frozen=True)
class Case:
    """One way to train. `folder` holds a tiny checkpoint."""

    family: str
    adapter: str
    folder: Path
    samples: Samples | None = None
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulation: int = 1
    quantization: Quantization | None = None
    strengths: tuple[float, ...] = (1.0,)
    """Of the adapter, in turns: those of a slider's steps."""

    @property
    def name(self) -> str:
        recompute = "recompute" if self.checkpointing else "keep"
        base = f" {self.quantization}" if self.quantization else ""
        base += " slider" if len(self.strengths) > 1 else ""
        return f"{self.family} {self.adapter} {self.precision} {self.optimizer} {recompute} x{self.accumulation}{base}"


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


def train(strategy: str, case: Case) -> Trained:
    """`STEPS` optimizer steps on fixed latents, in an initialised process group."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    distributed = parallel.Distributed(rank, rank, world, torch.device("cpu"))
    plan, family = plan_of(strategy, world, case), get_family(case.family)
    trained = _build(case, plan, family, distributed)
    model, wrapped, called = trained.model, trained.wrapped, trained.called
    named = adapters.trainable(model)
    hyperparameters = Hyperparameters(steps=STEPS, optimizer=Optimizer(type=case.optimizer, epsilon=1e-3))
    optimizer = build_optimizer(list(named.values()), hyperparameters, plan.learning_rate)
    ema = Ema(named, 0.9)
    objective = build_objective(Objective(), family.facts, components.scheduler_config(case.folder))
    losses, norms, drawn = [], [], torch.empty(0)
    dtypes: set[str] = set()
    blocks_of(model, family)[0].register_forward_pre_hook(
        lambda block, _: dtypes.update(str(p.dtype) for p in block.parameters())
    )
    before = parallel.full_state(wrapped, named)
    for step in range(STEPS):
        if step == STEPS - 1:
            drawn = _draw(case, family, called, ema, trained.encode)
        if trained.draw is not None:
            trained.draw(sample_generator(0, step, ADAPTER_SLOT))
        share = torch.zeros(())
        for micro in range(case.accumulation):
            size = plan.micro_batch_size
            first = (micro * world + rank) * size
            last = micro == case.accumulation - 1
            strong = adapters.at_strength([model], case.strengths[step % len(case.strengths)])
            with strong, nullcontext() if last else parallel.no_sync(called):
                slots = range(first, first + size)
                losses_of = _losses(case, family, called, objective, step, slots, trained.encode)
                loss = losses_of.sum() / GLOBAL_BATCH
                (loss * world).backward()
            share += loss.detach()
        torch.distributed.all_reduce(share)
        losses.append(float(share))
        norms.append(float(clip_gradients(named.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
    averages = {name: _whole(average) for name, average in ema.state_dict()["averages"].items()}
    return Trained(
        losses, norms, drawn, before, parallel.full_state(wrapped, named), averages,
        local_elements=sum(_local(p).numel() for p in model.parameters()),
        reduced_elements=_reduced_elements(wrapped),
        dtypes_in_a_block=dtypes,
    )  # fmt: skip


@dataclass(frozen=True)
class Built:
    """What is trained, as it is and as the strategy has it, and what is called; `draw` and `encode` as in an adapter's report."""

    model: nn.Module
    wrapped: nn.Module
    called: nn.Module
    draw: adapters.Draw | None = None
    encode: adapters.Encode | None = None


def _build(case: Case, plan: ExecutionPlan, family: Family, distributed: parallel.Distributed) -> Built:
    trained_dtype = torch.bfloat16 if case.optimizer == "adamw-bf16" else torch.float32
    frozen_dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    base_dtype = trained_dtype if case.adapter == "full" else frozen_dtype
    model = components.load_denoiser(case.folder, family.denoisers[0], base_dtype, distributed.device)
    compute = torch.bfloat16 if case.precision == "bf16" else None
    if case.adapter == "controlnet":
        assert family.control is not None
        torch.manual_seed(3)  # what is sharded has to be the same on all ranks
        network, _ = adapters.build_control_network(model, family, dtype=trained_dtype, device=distributed.device)
        if case.quantization is not None:
            quantize(model, case.quantization, family, distributed.device)
        base = parallel.wrap(model, plan, family, distributed, compute_dtype=compute)
        wrapped = parallel.wrap(network, plan, family, distributed, compute_dtype=compute)
        return Built(network, wrapped, Controlled(base, wrapped, family.control))
    if case.quantization is not None:
        quantize(model, case.quantization, family, distributed.device)
    torch.manual_seed(3 + distributed.rank)  # ranks draw different adapters: those of rank 0 must win
    load_encoders = partial(components.load_encoders, family, case.folder, base_dtype, distributed.device)
    report = adapters.install(model, ADAPTERS[case.adapter], family, dtype=trained_dtype, load_encoders=load_encoders)
    wrapped = parallel.wrap(model, plan, family, distributed, compute_dtype=compute)
    return Built(model, wrapped, wrapped, report.draw, report.encode)


def _losses(
    case: Case,
    family: Family,
    wrapped: nn.Module,
    objective: Any,
    step: int,
    slots: range,
    encode: adapters.Encode | None,
) -> Tensor:
    assert case.samples is not None
    generators = [torch.Generator().manual_seed(1000 * step + slot) for slot in slots]
    stage = family.stages(components.read_pipeline_config(case.folder), family.denoisers[:1])[0]
    prepared = objective.prepare(case.samples.latents[list(slots)], generators, stage=stage, tokens=16)
    conditions = case.samples.conditions(family, slots, encode, controlled=case.adapter == "controlnet")
    prediction = _predict(case, family, wrapped, prepared.noisy, prepared.time, conditions)
    return objective.loss(prediction, prepared, family.loss_mask(prediction, conditions))


def _predict(
    case: Case, family: Family, wrapped: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions
) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
        return family.predict(wrapped, noisy, time, conditions)


def _draw(case: Case, family: Family, wrapped: nn.Module, ema: Ema, encode: adapters.Encode | None) -> Tensor:
    """A prediction by the average, on all ranks alike, as sampling does it between two steps."""
    assert case.samples is not None
    steps = family.facts.objective == "diffusion" and family.facts.noise_schedule == "betas"
    time = torch.tensor([500]) if steps else torch.tensor([0.5])
    with ema.swapped(), torch.no_grad():
        conditions = case.samples.conditions(family, range(1), encode, controlled=case.adapter == "controlnet")
        return _predict(case, family, wrapped, case.samples.latents[1:2], time, conditions).float()


def _local(tensor: Tensor) -> Tensor:
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
        control=None if tiny.family.control is None else conditions_of(tiny, range(len(captions))),
        captions=captions,
    )
