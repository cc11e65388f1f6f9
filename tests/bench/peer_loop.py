"""The two loops that ours is compared with: nothing but the pass itself, and the loop of diffusers' example trainers."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from bench_run import LEARNING_RATE
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm

from atelier_runtime import adapters, components
from atelier_runtime.family import Conditions
from atelier_runtime.trainer import Parts


class BareLoop:
    """Forward and backward of one micro-batch that lies ready, on the network that ours trains."""

    def __init__(self, parts: Parts) -> None:
        batch = parts.dataset.load(parts.dataset.order.batch(0).slots, step=0, epoch=0)
        generators = [torch.Generator().manual_seed(slot) for slot in batch.slots]
        stage = parts.denoisers.stages[0]
        self._prepared = parts.objective.prepare(batch.latents.float(), generators, stage=stage, tokens=16)
        self._conditions = Conditions(parts.family.collate_text(batch.text), batch.sizes)
        self._model = parts.denoisers.wrapped[stage.denoiser]
        self._predict = parts.family.predict
        self._trained = list(parts.state.parameters.values())

    def step(self) -> None:
        prepared = self._prepared
        prediction = self._predict(self._model, prepared.noisy, prepared.time, self._conditions)
        torch.nn.functional.mse_loss(prediction, prepared.target).backward()
        for parameter in self._trained:
            parameter.grad = None


@dataclass(frozen=True)
class PeerParts:
    """What the example trainers work with. `samples`: latents [C, H, W] and text features, where the script keeps them."""

    accelerator: Accelerator
    model: Any
    predict: Callable[..., Tensor]
    samples: list[tuple[Tensor, dict[str, Tensor]]]
    batch_size: int
    scheduler: Any
    fused: bool


@dataclass(frozen=True)
class _Prepared:
    """What `Accelerator.prepare` gives back."""

    model: Any
    optimizer: Any
    loader: Any
    scheduler: Any


def cpu_parts(parts: Parts, *, fused: bool = False) -> PeerParts:
    """The demo's run as `train_dreambooth_lora_sd3.py` has it: same checkpoint, modules, rank, rate and samples as ours."""
    folder = parts.run_file.model_folder
    model = components.load_denoiser(folder, "transformer", torch.float32, torch.device("cpu"))
    targets = adapters.resolve_targets(model, ["attention"], parts.family)
    model.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=list(targets)))
    model.train()
    return PeerParts(
        accelerator=Accelerator(cpu=True, gradient_accumulation_steps=1),
        model=model,
        predict=parts.family.predict,
        samples=_samples(parts),
        batch_size=parts.run_file.spec.hyperparameters.global_batch_size,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(components.scheduler_config(folder)),
        fused=fused,
    )


class PeerLoop:
    """The step of diffusers' `train_dreambooth_lora_sd3.py`: accelerate, DataLoader, clipping, AdamW, scheduler, `.item()`, tqdm.

    Latents and text lie in memory, already encoded, which its `--cache_latents` does. `fused`: with torch's fused AdamW, which is not
    the script's default.
    """

    def __init__(self, parts: PeerParts) -> None:
        self._predict = parts.predict
        self._accelerator = parts.accelerator
        self._schedule = parts.scheduler
        self._prepared = self._prepare(parts)
        self._batches = self._forever()
        self._bar = tqdm(total=10**9, desc="Steps", file=open(os.devnull, "w"), mininterval=1e9)  # noqa: SIM115
        self._steps = 0
        self.losses: list[float] = []
        self.data_seconds = 0.0

    def _prepare(self, parts: PeerParts) -> _Prepared:
        trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True if parts.fused else None)
        loader = torch.utils.data.DataLoader(parts.samples, batch_size=parts.batch_size, shuffle=True, drop_last=True)
        scheduler = get_scheduler("constant", optimizer=optimizer)
        return _Prepared(*self._accelerator.prepare(parts.model, optimizer, loader, scheduler))

    def _forever(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        while True:
            yield from self._prepared.loader

    def _sigmas(self, timesteps: Tensor, dimensions: int) -> Tensor:
        """Noise levels by looking the timesteps up in the scheduler's table, one after the other, as the script does."""
        table = self._schedule.timesteps.to(timesteps.device)
        steps = [int((table == t).nonzero().item()) for t in timesteps]
        sigma = self._schedule.sigmas.to(timesteps.device)[steps].flatten()
        while sigma.ndim < dimensions:
            sigma = sigma.unsqueeze(-1)
        return sigma

    def _loss(self, latents: Tensor, text: dict[str, Tensor]) -> Tensor:
        noise = torch.randn_like(latents)
        levels = compute_density_for_timestep_sampling("logit_normal", len(latents), logit_mean=0.0, logit_std=1.0)
        indices = (levels * self._schedule.config.num_train_timesteps).long()
        timesteps = self._schedule.timesteps[indices].to(latents.device)
        sigmas = self._sigmas(timesteps, latents.ndim)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        conditions = Conditions(text, torch.empty(0))
        prediction = self._predict(self._prepared.model, noisy, timesteps / 1000, conditions)
        weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
        error = weighting.float() * (prediction.float() - (noise - latents).float()) ** 2
        return error.reshape(len(latents), -1).mean(1).mean()

    def step(self) -> None:
        prepared, accelerator = self._prepared, self._accelerator
        started = time.perf_counter()
        latents, text = next(self._batches)
        self.data_seconds += time.perf_counter() - started
        with accelerator.accumulate(prepared.model):
            loss = self._loss(latents, text)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                trained = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
                accelerator.clip_grad_norm_(trained, 1.0)
            prepared.optimizer.step()
            prepared.scheduler.step()
            prepared.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self._bar.update(1)
            self._steps += 1
        logs = {"loss": loss.detach().item(), "lr": prepared.scheduler.get_last_lr()[0]}
        self._bar.set_postfix(**logs)
        accelerator.log(logs, step=self._steps)
        self.losses.append(logs["loss"])


def _samples(parts: Parts) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Every sample of the training set once: latents (the posterior's mean) and text features in fp32."""
    order = parts.dataset.order
    batches = [order.batch(step) for step in range(order.steps_per_epoch)]
    slots = [slot for batch in batches for slot in batch.slots if slot.weight]
    loaded = [parts.dataset.load([slot], step=0, epoch=0) for slot in slots]
    return [(one.latents[0].float(), {key: value.float() for key, value in one.text[0].items()}) for one in loaded]
