"""A few training steps of a tiny denoiser, the way the trainer does them, for comparing strategies. Runs in every rank."""

import gc
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.quantizations import Quantization
from atelier_api.run_file import ExecutionPlan, RunFile
from atelier_api.v1alpha1.adapter import (
    BoftAdapter,
    ControlNetAdapter,
    DyloraAdapter,
    FullAdapter,
    Ia3Adapter,
    LokrAdapter,
    LoraAdapter,
    TextualInversionAdapter,
)
from atelier_api.v1alpha1.hyperparameters import Ema, Hyperparameters, Optimizer
from atelier_runtime import parallel
from atelier_runtime.adapters import Encode, at_strength
from atelier_runtime.control import CONTROL_NETWORK, Controlled
from atelier_runtime.denoisers import Denoisers, gathered_weights
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Family, Features, Stage
from atelier_runtime.parallel.wrap import blocks_of
from atelier_runtime.run_network import RunNetwork
from atelier_runtime.techniques import Pass, build_techniques
from atelier_runtime.trainer import ADAPTER_SLOT, build_run_objective, build_state, sample_generator
from atelier_runtime.zero_state import ZeroState
from control_cases import conditions_of
from family_cases import Case as FamilyCase
from family_models import FAMILY_OF
from run_files import run_file

STEPS = 2
"""The second starts from what the first left: moments, average, the other expert. A third would show nothing new."""
GLOBAL_BATCH = 4
ADAPTERS: dict[str, Any] = {
    "lora": LoraAdapter(rank=4, targets=["all"]),
    "lora-attention": LoraAdapter(rank=4, targets=["attention"]),
    "full": FullAdapter(type="full"),
    "lokr": LokrAdapter(type="lokr", factor=4, targets=["all"]),
    "boft": BoftAdapter(type="boft", block_size=16, targets=["all"]),
    "dylora": DyloraAdapter(type="dylora", rank=4, targets=["all"]),
    "textual-inversion": TextualInversionAdapter.model_validate(
        {"type": "textual-inversion", "tokens": [{"token": "<fox>", "initializer": "f", "vectors": 2}]}
    ),
    "ia3": Ia3Adapter(type="ia3", input_targets=["mlp"], targets=["all"]),
    "controlnet": ControlNetAdapter(type="controlnet"),
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
        self, family: Family, slots: range, encode: Encode | None = None, *, controlled: bool = False
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
    """One way to train. `tiny` is a pipeline of `family_models`, and `folder` holds its checkpoint; `weight` multiplies gradients.

    `layer_sync` are LayerSync's student and teacher. `few_steps`: a few-step generator, by TwinFlow.
    """

    tiny: str
    adapter: str
    folder: Path
    samples: Samples | None = None
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    accumulation: int = 1
    quantization: Quantization | None = None
    weight: float = 1.0
    layer_sync: tuple[int, int] | None = None
    few_steps: bool = False
    steps: int = STEPS
    strengths: tuple[float, ...] = (1.0,)
    """Of the adapter, in turns: those of a slider's steps."""
    draws: bool = True
    """Predict with the average before the last step, as sampling does between two steps."""

    @property
    def name(self) -> str:
        recompute = "recompute" if self.checkpointing else "keep"
        base = f" {self.quantization}" if self.quantization else ""
        base += " slider" if len(self.strengths) > 1 else ""
        weight = "" if self.weight == 1 else f" times {self.weight:g}"
        sync = " layersync" if self.layer_sync else ""
        sync += " twinflow" if self.few_steps else ""
        words = (self.tiny, self.adapter, self.precision, self.optimizer, recompute, f"x{self.accumulation}")
        return " ".join(words) + base + weight + sync


@dataclass(frozen=True)
class Trained:
    """What came of a case. `losses` are global means; `drawn` is the prediction of a case that draws, else empty."""

    losses: list[float]
    norms: list[float]
    drawn: Tensor
    before: dict[str, Tensor]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    local_elements: int
    reduced_elements: int
    dtypes_in_a_block: set[str]
    rounded_in_a_block: bool


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


def train_all(world: int, ways: Sequence[tuple[str, Case]]) -> dict[tuple[str, str], Trained | str]:
    """Each case under the strategy beside it, by (strategy, case name); a traceback in place of what failed."""
    strategy, case = ways[0]
    parallel.start(plan_of(strategy, world, case))
    results: dict[tuple[str, str], Trained | str] = {}
    try:
        for strategy, case in ways:
            gc.freeze()  # DeepSpeed asks for a collection in each case, which would walk all that was ever imported
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
        self.case = case
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        distributed = parallel.Distributed(self.rank, self.rank, self.world, torch.device("cpu"))
        self.plan, self.family = plan_of(strategy, self.world, case), get_family(FAMILY_OF[case.tiny])
        made = _run_file(case, self.plan, self.rank)
        self.denoisers = Denoisers.load(made, self.family, distributed)
        # All ranks round alike what they all hold.
        hyperparameters = made.spec.hyperparameters.model_copy(update={"seed": 0})
        self.state = build_state(self.denoisers, hyperparameters, self.plan, distributed)
        self._objective = build_run_objective(made, self.family)
        self._techniques = build_techniques(made.spec.techniques, self.family, self.denoisers.models)
        self._network = RunNetwork(
            self.family,
            [technique.watching for technique in self._techniques],
            bf16=case.precision == "bf16",
            device=distributed.device,
            averaged=self.state.averaged,
        )

    def step(self) -> tuple[float, float]:
        """One optimizer step, of the stages in turn. Gives the global mean of the loss, and the gradient's norm."""
        case, step, size = self.case, self.state.step, self.plan.micro_batch_size
        stages = self.denoisers.stages
        stage = stages[step % len(stages)]
        denoiser = self.denoisers.wrapped[stage.denoiser]
        if stage.denoiser in self.denoisers.draws:
            self.denoisers.draws[stage.denoiser](sample_generator(0, step, ADAPTER_SLOT))
        strength = case.strengths[step % len(case.strengths)]
        share = torch.zeros(())
        with at_strength(self.denoisers.models.values(), strength), torch.set_grad_enabled(strength != 0):
            for micro in range(case.accumulation):
                first = (micro * self.world + self.rank) * size
                with parallel.micro_batch(denoiser, last=micro == case.accumulation - 1):
                    loss = self._losses(denoiser, stage, range(first, first + size)).sum() / GLOBAL_BATCH
                    if strength != 0:
                        (loss * self.world * case.weight).backward()
                share += loss.detach()
        torch.distributed.all_reduce(share)
        norm = self.state.update(stage.denoiser, self.plan.learning_rate) if strength != 0 else 0.0
        self.state.step += 1
        return float(share), float(norm)

    def draw(self) -> Tensor:
        """A prediction by the average, on all ranks alike, as sampling does it between two steps: not by way of the strategy."""
        case, name, models = self.case, self.denoisers.stages[0].denoiser, self.denoisers.models
        assert case.samples is not None
        denoiser = models[name]
        if CONTROL_NETWORK in models:
            assert self.family.control is not None
            denoiser = Controlled(denoiser, models[CONTROL_NETWORK], self.family.control)
        steps = self.family.facts.objective == "diffusion" and self.family.facts.noise_schedule == "betas"
        time = torch.tensor([500]) if steps else torch.tensor([0.5])
        with self.state.averaged(), torch.no_grad():
            return self._predict(denoiser, case.samples.latents[1:2], time, self._conditions(range(1))).float()

    def weights(self) -> dict[str, Tensor]:
        """Whole trained weights by full name, on rank 0; empty elsewhere. Collective."""
        gathered = gathered_weights(self.denoisers)
        return {f"{name}.{key}": weight for name, state in gathered.items() for key, weight in state.items()}

    def averages(self) -> dict[str, Tensor]:
        """Whole moving averages by full name. Collective."""
        if isinstance(self.state, ZeroState):  # with the rest of its state, it would gather four times as much
            assert self.state._ema is not None
            parts = self.state._ema.state_dict()["averages"]
            return {name: owner.whole(held, parts[name]).clone() for name, held, owner in self.state._owned()}
        return {name: _whole(average) for name, average in self.state.tensors()["ema"]["averages"].items()}

    def _losses(self, denoiser: nn.Module, stage: Stage, slots: range) -> Tensor:
        assert self.case.samples is not None
        generators = [torch.Generator().manual_seed(1000 * self.state.step + slot) for slot in slots]
        latents = self.case.samples.latents[list(slots)]
        prepared = self._objective.prepare(latents, generators, stage=stage, tokens=16)
        conditions = self._conditions(slots)
        network, mask = self._network, self.family.loss_mask(latents, conditions)
        network.denoiser, network.conditions = denoiser, conditions
        if self.case.few_steps:
            empty = self.case.samples.text[self.case.samples.captions.index("")]
            network.contrast = replace(conditions, text=self.family.collate_text([empty] * len(slots)))
        losses = self._objective.losses(network, prepared, mask)
        return sum((each.loss(Pass(latents, conditions, mask)) for each in self._techniques), losses)

    def _conditions(self, slots: range) -> Conditions:
        assert self.case.samples is not None
        controlled = self.case.adapter == "controlnet"
        return self.case.samples.conditions(self.family, slots, self.denoisers.encode, controlled=controlled)

    def _predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.precision == "bf16"):
            return self.family.predict(denoiser, noisy, time, conditions)


def train(strategy: str, case: Case) -> Trained:
    """The case's optimizer steps on fixed latents, in an initialised process group."""
    training = Training(strategy, case)
    models = training.denoisers.models
    losses, norms, drawn = [], [], torch.empty(0)
    dtypes: set[str] = set()
    rounded: list[bool] = []
    for layer in blocks_of(next(iter(models.values())), training.family)[0].modules():
        layer.register_forward_pre_hook(
            lambda computing, _: dtypes.update(str(p.dtype) for p in computing.parameters(recurse=False))
        )
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda linear, _: rounded.append(_is_rounded(linear.weight)))
    before = training.weights()
    for step in range(case.steps):
        if case.draws and step == case.steps - 1:
            drawn = training.draw()
        loss, norm = training.step()
        losses.append(loss)
        norms.append(norm)
    return Trained(
        losses, norms, drawn, before, training.weights(), training.averages(),
        local_elements=sum(_local(p).numel() for model in models.values() for p in model.parameters()),
        reduced_elements=_reduced_elements(training.denoisers),
        dtypes_in_a_block=dtypes,
        rounded_in_a_block=all(rounded),
    )  # fmt: skip


def _run_file(case: Case, plan: ExecutionPlan, rank: int) -> RunFile:
    """The run of a case. Ranks draw different adapters: those of rank 0 must win. A control network is drawn alike: it is sharded."""
    hyperparameters = Hyperparameters(
        steps=case.steps,
        seed=3 if case.adapter == "controlnet" else 3 + rank,
        optimizer=Optimizer(type=case.optimizer, epsilon=1e-3),
        gradient_clip=0.5,
        ema=Ema(decay=0.9),
        precision=case.precision,
    )
    made = run_file(
        case.folder,
        model={"family": FAMILY_OF[case.tiny], "source": str(case.folder), "quantization": case.quantization},
        adapter=ADAPTERS[case.adapter],
        hyperparameters=hyperparameters,
        publish={"formats": ["diffusers"]},
        techniques=_techniques(case),
        # The smaller delta is, the more a target hangs on the last digits of a prediction.
        objective={"twinFlow": {"delta": "0.2"}} if case.few_steps else {},
    )
    return made.model_copy(update={"plan": plan})


def _techniques(case: Case) -> dict[str, Any]:
    if case.layer_sync is None:
        return {}
    student, teacher = case.layer_sync
    return {"layerSync": {"studentBlock": student, "teacherBlock": teacher}}


def _is_rounded(weight: Tensor) -> bool:
    """Whether a weight is made of numbers that bf16 has, whatever its dtype."""
    return torch.equal(weight, weight.bfloat16().to(weight.dtype))


def _local(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def _reduced_elements(denoisers: Denoisers) -> int:
    """Elements whose gradients DDP sums over the ranks, by its own account."""
    reduced = 0
    for wrapped in denoisers.wrapped.values():
        for module in (wrapped, *wrapped.children()):  # a control network is beside its base
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                own = (p for p in module.parameters() if p.requires_grad and not hasattr(p, "to_local"))
                size = next(own).element_size()
                reduced += int(module._get_ddp_logging_data()["total_parameter_size_bytes"]) // size
    return reduced


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
