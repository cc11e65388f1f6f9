"""The training of one rank, from top to bottom: prepare, loop, finish.

The trainer composes the parts (adapters, objectives, techniques, optimizers, data, parallel, checkpoint, observe); it knows no family
and no technique by name. What differs between families is behind `Family`, what is predicted behind `Objective`, what is trained
beside that behind `Technique`.
"""

import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from atelier_api.errors import DivergedError, StoreError
from atelier_api.run_file import ExecutionPlan, RunFile
from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_runtime import components, parallel
from atelier_runtime.adapters import at_strength
from atelier_runtime.checkpoint import Checkpointer
from atelier_runtime.data import Dataset, Loader, MicroBatch, StepBatch
from atelier_runtime.denoisers import Denoisers
from atelier_runtime.family import Conditions, Family, Features, Stage, latent_tokens
from atelier_runtime.objectives import Objective, build_objective
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.optimizers import Ema, build_optimizer, learning_rate_at
from atelier_runtime.parallel import Distributed
from atelier_runtime.reporter import Reporter
from atelier_runtime.run_network import RunNetwork
from atelier_runtime.step_agreement import StepAgreement, StepFacts
from atelier_runtime.techniques import Pass, Technique
from atelier_runtime.train_state import State, TrainState
from atelier_runtime.zero_state import ZeroState

log = logging.getLogger(__name__)


STAGE_SLOT, ADAPTER_SLOT = -1, -2
"""Slots of what is drawn once for a whole step: the stage, and what the adapter draws."""


def sample_generator(seed: int, step: int, slot: int, generator: torch.Generator | None = None) -> torch.Generator:
    """The generator of one sample of one step. `slot` is its place in the global batch, so that draws do not depend on the ranks.

    `generator` is seeded and given back where there is one to spare: making one takes longer than seeding it.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{slot}".encode(), digest_size=8).digest()
    return (generator or torch.Generator()).manual_seed(int.from_bytes(digest, "big") >> 1)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators: that of the CPU, and where a GPU trains, that one's. Draws are those after `torch.manual_seed`.

    That function also seeds backends that are not there, and writes down a stack trace for each: half a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

    run_file: RunFile
    family: Family
    distributed: Distributed
    denoisers: Denoisers
    objective: Objective
    dataset: Dataset
    state: State
    checkpointer: Checkpointer
    metrics: TrainMetrics
    reporter: Reporter
    techniques: tuple[Technique, ...] = ()


def build_state(
    denoisers: Denoisers, hyperparameters: Hyperparameters, plan: ExecutionPlan, distributed: Distributed
) -> State:
    """Optimizer and moving average over the trained parameters, at step 0. Collective."""
    parameters = denoisers.trainable()
    decay = hyperparameters.ema.decay if hyperparameters.ema else None
    partitioned = {name: m for name, m in denoisers.wrapped.items() if isinstance(m, parallel.Partitioned)}
    if partitioned:
        return ZeroState(partitioned, parameters, distributed, ema_decay=decay)
    optimizer = build_optimizer(list(parameters.values()), hyperparameters, plan.learning_rate)
    ema = None if decay is None else Ema(parameters, decay)
    return TrainState(parameters, optimizer, ema, gradient_clip=hyperparameters.gradient_clip)


def build_run_objective(run_file: RunFile, family: Family) -> Objective:
    """The objective with the checkpoint's own scheduler as the source of its defaults."""
    return build_objective(run_file.spec.objective, family.facts, components.scheduler_config(run_file.model_folder))


class Trainer:
    """The loop. `run` ends at the last step (True) or at a request to stop (False), in both cases with a committed checkpoint."""

    def __init__(self, parts: Parts, stop_requested: Callable[[], bool]) -> None:
        self._parts = parts
        self._stop_requested = stop_requested
        self._agreement = StepAgreement(parts.distributed)
        self._last_checkpoint_time = time.monotonic()
        self._last_saved_step = parts.state.step
        self._names: dict[int, Sequence[str]] = {}
        self._spare_generators: list[torch.Generator] = []
        device = parts.distributed.device
        bf16 = parts.run_file.spec.hyperparameters.precision == "bf16"
        self._network = RunNetwork(
            parts.family,
            [technique.watching for technique in parts.techniques],
            bf16=bf16,
            device=device,
            averaged=parts.state.averaged,
        )
        self._shared = {name: tensor.to(device) for name, tensor in parts.dataset.shared.items()}
        # Data-parallel gradients are averaged over the ranks, and the loss is a sum over them.
        self._ranks = torch.tensor(float(parts.distributed.world_size), device=parts.distributed.device)

    def run(self, on_sample_step: Callable[[int], None]) -> bool:
        """Train up to `hyperparameters.steps`. `on_sample_step(step)` draws the samples; it is collective."""
        parts, state = self._parts, self._parts.state
        spec = parts.run_file.spec
        checkpoint, every_samples = spec.storage.checkpoint, spec.validation.every_steps
        loader = Loader(
            parts.dataset,
            rank=parts.distributed.rank,
            world_size=parts.distributed.world_size,
            micro_batch_size=parts.run_file.plan.micro_batch_size,
            start_step=state.step,
        )
        stopped = False
        with ExitStack() as stack:
            stack.callback(loader.close)
            while state.step < spec.hyperparameters.steps and not stopped:
                started = time.perf_counter()
                with parts.metrics.phase("data"):
                    step, micro_batches = next(loader)
                batch = parts.dataset.order.batch(step)
                losses, norm = self._step(batch, micro_batches, loader.read_on)
                state.step = step + 1
                self._names[step] = [name for micro_batch in micro_batches for name in micro_batch.names]
                facts = self._agreement.submit(
                    step,
                    losses,
                    norm,
                    stop=self._stop_requested(),
                    checkpoint_due=self._time_for_checkpoint(checkpoint.every_seconds),
                )
                stopped, save_now = self._confirm(facts)
                if stopped or save_now or self._is_boundary(state.step, checkpoint.every_steps, every_samples):
                    # Nothing unconfirmed is ever saved: the facts of this very step are waited for.
                    stop_too, save_too = self._confirm(self._agreement.collect())
                    stopped, save_now = stopped or stop_too, save_now or save_too
                parts.reporter.step_finished(
                    state.step,
                    time.perf_counter() - started,
                    pixels=_pixels(micro_batches[0], batch.total_weight),
                    data_wait_seconds=loader.wait_seconds,
                )
                due = checkpoint.every_steps > 0 and state.step % checkpoint.every_steps == 0
                if due or save_now or stopped:
                    self._save()
                if (
                    every_samples > 0
                    and state.step % every_samples == 0
                    and state.step < spec.hyperparameters.steps
                    and not stopped
                ):
                    on_sample_step(state.step)
                parts.reporter.poll(parts.checkpointer)
            if self._last_saved_step != state.step:
                self._save()
            parts.checkpointer.wait()
            parts.reporter.poll(parts.checkpointer)
        if stopped:
            self._require_saved()
        return not stopped

    def _step(
        self, batch: StepBatch, micro_batches: Sequence[MicroBatch], read_on: Callable[[], None]
    ) -> tuple[list[Tensor], Tensor]:
        """One optimizer step. Gives this rank's shares of the mean losses, and the norm of the global gradient before clipping.

        `micro_batches` are this rank's part of the batch.
        `read_on` is called where this thread leaves the interpreter to others for a while.
        """
        parts, metrics, step = self._parts, self._parts.metrics, batch.step
        hyperparameters = parts.run_file.spec.hyperparameters
        seed_torch(_step_seed(hyperparameters.seed, step, parts.distributed.rank), parts.distributed.device)
        stage = self._pick_stage(batch)
        denoiser = parts.denoisers.wrapped[stage.denoiser]
        if stage.denoiser in parts.denoisers.draws:
            parts.denoisers.draws[stage.denoiser](sample_generator(hyperparameters.seed, step, ADAPTER_SLOT))
        rate = learning_rate_at(step, hyperparameters, parts.run_file.plan.learning_rate)
        shares, total_weight, trains = [], batch.total_weight, batch.trains
        with at_strength(parts.denoisers.models.values(), batch.strength), nullcontext() if trains else torch.no_grad():
            for index, micro_batch in enumerate(micro_batches):
                with parallel.micro_batch(denoiser, last=index == len(micro_batches) - 1):
                    with metrics.phase("forward"):
                        losses = [loss / total_weight for loss in self._losses(denoiser, micro_batch, step, stage)]
                    read_on()
                    if trains:
                        with metrics.phase("backward"):
                            functools.reduce(torch.add, losses).backward(self._ranks)  # type: ignore[no-untyped-call]
                shares.append([loss.detach() for loss in losses])
        with metrics.phase("optimizer"):
            norm = parts.state.update(stage.denoiser, rate) if trains else shares[0][0].new_zeros(())
        parts.reporter.learning_rate = rate
        return [functools.reduce(torch.add, column) for column in zip(*shares, strict=True)], norm

    def _losses(self, denoiser: nn.Module, batch: MicroBatch, step: int, stage: Stage) -> list[Tensor]:
        """Sums over the micro-batch of weight times loss: the objective's, then each technique's."""
        parts = self._parts
        device = parts.distributed.device
        seed = parts.run_file.spec.hyperparameters.seed
        spare = self._spare_generators
        spare.extend(torch.Generator() for _ in range(len(batch.slots) - len(spare)))
        generators = [sample_generator(seed, step, slot, spare[i]) for i, slot in enumerate(batch.slots)]
        clean = _drawn(batch.latents, batch.std, generators, device)
        control = None if batch.condition is None else control_input(batch.condition, generators, device)
        prepared = parts.objective.prepare(clean, generators, stage=stage, tokens=latent_tokens(parts.family, clean))
        frames = batch.frames and {key: value.to(device, non_blocking=True) for key, value in batch.frames.items()}
        conditions = Conditions(
            text=self._text(batch),
            sizes=batch.sizes.to(device),
            frame_rate=parts.dataset.frame_rate,
            frames=frames,
            references=tuple(each.to(device, torch.float32, non_blocking=True) for each in batch.references),
            lengths=batch.lengths,
            shared=self._shared,
            control=control,
        )
        network, mask = self._network, parts.family.loss_mask(clean, conditions)
        network.denoiser, network.conditions = denoiser, conditions
        if batch.contrast:
            network.contrast = replace(conditions, text=self._text(replace(batch, text=batch.contrast)))
        losses = [parts.objective.losses(network, prepared, mask)]
        seen, weights = Pass(clean, conditions, mask), batch.weights.to(device)
        losses += [technique.loss(seen) for technique in parts.techniques]
        return [(loss * weights).sum() for loss in losses]

    def _text(self, batch: MicroBatch) -> Features:
        """Features of the captions on the device: from the cache, or where the adapter trains what reads them made now."""
        if self._parts.denoisers.encode is not None:
            return self._parts.denoisers.encode(batch.captions)
        device = self._parts.distributed.device
        collated = self._parts.family.collate_text(batch.text)
        return {key: value.to(device, non_blocking=True) for key, value in collated.items()}

    def _pick_stage(self, batch: StepBatch) -> Stage:
        """The stage of this step, the same on all ranks: one optimizer step trains one denoiser."""
        stages = self._parts.denoisers.stages
        if len(stages) == 1:
            return stages[0]
        seed = self._parts.run_file.spec.hyperparameters.seed
        generator = sample_generator(seed, batch.step, STAGE_SLOT)
        return self._parts.objective.pick_stage(stages, generator, tokens=batch.tokens)

    def _confirm(self, facts: StepFacts | None) -> tuple[bool, bool]:
        """Report the numbers of a step; raise DivergedError when they are not finite. Gives (stop, checkpoint is due)."""
        if facts is None:
            return False, False
        names = self._names.pop(facts.step, ())
        if not (math.isfinite(facts.loss) and math.isfinite(facts.gradient_norm)):
            self._parts.metrics.nonfinite()
            raise DivergedError(
                f"the loss of step {facts.step} is {facts.loss} and its gradient norm {facts.gradient_norm}; both must be finite. "
                f"Samples of this process in that step: {', '.join(names) or 'none'}. The newest checkpoint is from before it; "
                "lower spec.hyperparameters.learningRate or look at these samples",
                step=facts.step,
                files=names,
            )
        techniques = [technique.name for technique in self._parts.techniques]
        self._parts.reporter.step_confirmed(facts, dict(zip(techniques, facts.techniques, strict=True)))
        return facts.stop, facts.checkpoint_due

    def _save(self) -> None:
        parts = self._parts
        with parts.metrics.checkpoint_stall(), parts.reporter.timed("checkpoint"):
            parts.checkpointer.save(parts.state.step, parts.state.tensors())
            if parts.distributed.rank == 0:
                parts.reporter.keep_history()
        self._last_saved_step = parts.state.step
        self._last_checkpoint_time = time.monotonic()

    def _require_saved(self) -> None:
        """A stop promises a checkpoint of the last step; without one the reason must not read `Stopped`."""
        report = self._parts.checkpointer.latest_report
        if self._parts.distributed.rank == 0 and (report is None or report.step != self._parts.state.step):
            raise StoreError(
                f"the checkpoint of step {self._parts.state.step}, made on the request to stop, could not be stored; "
                f"the newest good one is of step {report.step if report else 'none'}: see the log for the reason"
            )

    def _time_for_checkpoint(self, every_seconds: int) -> bool:
        """Whether rank 0's clock asks for a checkpoint; other ranks never do, since clocks differ."""
        return (
            every_seconds > 0
            and self._parts.distributed.rank == 0
            and time.monotonic() - self._last_checkpoint_time >= every_seconds
        )

    def _is_boundary(self, step: int, every_steps: int, every_samples: int) -> bool:
        last = step == self._parts.run_file.spec.hyperparameters.steps
        return last or any(every > 0 and step % every == 0 for every in (every_steps, every_samples))


def _drawn(mean: Tensor, std: Tensor | None, generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Latents in fp32: the mean of a posterior, or where it has a deviation a draw from it."""
    latents = mean.to(device, torch.float32, non_blocking=True)
    if std is None:
        return latents
    draws = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    return latents + std.to(device, torch.float32, non_blocking=True) * draws.to(device)


def control_input(picture: Features, generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """What a control network is given of conditioning pictures [B, ...]: pixels in [0, 1], or a draw of latents for each sample."""
    if "pixels" in picture:
        return picture["pixels"].to(device, non_blocking=True).to(torch.float32) / 255
    return _drawn(picture["mean"], picture.get("std"), generators, device)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's own generator in one step of one rank: dropout and stochastic rounding draw from it."""
    digest = hashlib.blake2b(f"rank:{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _pixels(batch: MicroBatch, samples: float) -> float:
    """Pixels of a global batch of `samples` samples, all of one bucket (frames of a clip are not counted); sounds have none."""
    if batch.lengths is not None:
        return 0.0
    _, _, _, _, height, width = batch.sizes[0].tolist()
    return float(height * width * samples)


def staging_folder(run_file: RunFile) -> Path:
    """Where checkpoints are written before they go to the store."""
    return Path(run_file.scratch) / "staging"
