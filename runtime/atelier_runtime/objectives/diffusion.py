"""DDPM diffusion: x_t = a x0 + b eps, a^2 = abar_t, b^2 = 1 - abar_t; target eps, or v = a eps - b x0 (arXiv:2202.00512)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.objective import Objective as ObjectiveSpec
from atelier_runtime.family import Stage
from atelier_runtime.objectives.objective import Objective, Prepared, check_generators, draw_noise, to_device
from atelier_runtime.objectives.timesteps import no_mass

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""What a sampler's config says about the betas; the rest of it is about sampling."""


class DiffusionObjective(Objective):
    """Epsilon or v prediction at a uniform integer step of the checkpoint's own noise schedule."""

    def __init__(self, spec: ObjectiveSpec, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        super().__init__(spec)
        self.prediction = resolve_prediction(spec.prediction, scheduler_config)
        schedule = {key: scheduler_config[key] for key in SCHEDULE_KEYS if scheduler_config.get(key) is not None}
        if "beta_schedule" not in schedule and "trained_betas" not in schedule:
            raise ConfigError(
                "the checkpoint's scheduler/scheduler_config.json names no beta_schedule; a diffusion family needs one to know "
                "its noise levels; use a checkpoint with a complete scheduler folder in spec.model"
            )
        if spec.noise.zero_terminal_snr:
            schedule["rescale_betas_zero_snr"] = True
        if schedule.get("rescale_betas_zero_snr") and self.prediction == "epsilon":
            where = (
                "spec.objective.noise.zeroTerminalSnr"
                if spec.noise.zero_terminal_snr
                else "the checkpoint's rescale_betas_zero_snr"
            )
            raise ConfigError(
                f"{where} is true and the prediction is epsilon, which says nothing about the picture at the last step; "
                "allowed is spec.objective.prediction v"
            )
        self.scheduler = DDPMScheduler(**schedule)
        self.steps = len(self.scheduler.alphas_cumprod)  # `trained_betas` need not be num_train_timesteps long

    def prepare(self, clean: Tensor, generators: Sequence[torch.Generator], *, stage: Stage, tokens: int) -> Prepared:
        check_generators(clean, generators)
        first, end = self._steps_of(stage)
        if first >= end:
            raise no_mass([stage])
        times, noises = [], []
        for generator in generators:
            times.append(int(torch.randint(first, end, (), generator=generator)))
            noises.append(self._noise(clean.shape[1:], generator))
        time = to_device(torch.tensor(times, dtype=torch.long), clean.device)
        noise = to_device(torch.stack(noises), clean.device)
        clean = clean.float()
        velocity = self.prediction == "v"
        return Prepared(
            noisy=self.scheduler.add_noise(clean, noise, time),
            time=time,
            target=self.scheduler.get_velocity(clean, noise, time) if velocity else noise,
            weight=self._weight(time),
        )

    def mass(self, stage: Stage, tokens: int) -> float:
        first, end = self._steps_of(stage)
        return max(end - first, 0) / self.steps

    def _steps_of(self, stage: Stage) -> tuple[int, int]:
        """The steps [first, end) whose level t / steps lies in the stage's [low, high)."""
        return math.ceil(stage.low * self.steps), math.ceil(stage.high * self.steps)

    def _noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        noise = draw_noise(shape, generator)
        if self.spec.noise.offset:
            per_channel = torch.Size([shape[0]] + [1] * (len(shape) - 1))
            noise = noise + self.spec.noise.offset * draw_noise(per_channel, generator)
        return noise

    def _weight(self, time: Tensor) -> Tensor:
        """Min-SNR weight [B] (arXiv:2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v; 1 when off."""
        gamma = self.spec.min_snr_gamma
        if gamma is None:
            return torch.ones(len(time), device=time.device)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, time)
        return snr.clamp(max=gamma) / (snr + 1 if self.prediction == "v" else snr)


def resolve_prediction(
    user: Literal["auto", "epsilon", "v"], scheduler_config: Mapping[str, Any]
) -> Literal["epsilon", "v"]:
    """What the network predicts. Raises ConfigError where the checkpoint's kind is neither epsilon nor v."""
    if user != "auto":
        return user
    checkpoint = scheduler_config.get("prediction_type", "epsilon")
    if checkpoint == "epsilon":
        return "epsilon"
    if checkpoint == "v_prediction":
        return "v"
    raise ConfigError(
        f"the checkpoint's scheduler has prediction_type {checkpoint!r}; allowed are epsilon and v_prediction; "
        "set spec.objective.prediction to epsilon or v if the checkpoint's config is wrong"
    )
