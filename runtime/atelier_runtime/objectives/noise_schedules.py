"""How much noise a time of a diffusion family stands for: x_t = a x0 + b eps, a^2 = abar(t), b^2 = 1 - abar(t).

Two kinds: integer steps of the checkpoint's betas, and a cosine of a continuous time (arXiv:2102.09672, eq. 17).
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_runtime.family import Stage
from atelier_runtime.objectives.timesteps import no_mass

BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""What a sampler's config says about the betas; the rest of it is about sampling."""

COSINE_SCHEDULER = "DDPMWuerstchenScheduler"
LEAST_SIGNAL, MOST_SIGNAL = 0.0001, 0.9999
"""The cosine is cut to these, as in diffusers' `scheduling_ddpm_wuerstchen.py`: no time is without noise, none without signal."""


class NoiseSchedule(Protocol):
    """A schedule of noise. `dtype` is that of its times."""

    dtype: torch.dtype

    def draw(self, stage: Stage, generator: torch.Generator) -> float:
        """A time of the stage's range, all alike. Raises ConfigError where there is none."""

    def mass(self, stage: Stage) -> float:
        """Probability in [0, 1] of the stage's range."""

    def alpha_bar(self, time: Tensor) -> Tensor:
        """Share of the signal's power, [B] fp32, for times [B]."""


class BetaSchedule:
    """The checkpoint's own betas, at integer steps."""

    dtype = torch.long

    def __init__(self, scheduler_config: Mapping[str, Any], *, zero_terminal_snr: bool, prediction: str) -> None:
        from diffusers import DDPMScheduler

        given = {key: scheduler_config[key] for key in BETA_KEYS if scheduler_config.get(key) is not None}
        if "beta_schedule" not in given and "trained_betas" not in given:
            raise ConfigError(
                "the checkpoint's scheduler/scheduler_config.json names no beta_schedule; a diffusion family needs one to know "
                "its noise levels; use a checkpoint with a complete scheduler folder in spec.model"
            )
        if zero_terminal_snr:
            given["rescale_betas_zero_snr"] = True
        if given.get("rescale_betas_zero_snr") and prediction == "epsilon":
            where = (
                "spec.objective.noise.zeroTerminalSnr"
                if zero_terminal_snr
                else "the checkpoint's rescale_betas_zero_snr"
            )
            raise ConfigError(
                f"{where} is true and the prediction is epsilon, which says nothing about the picture at the last step; "
                "allowed is spec.objective.prediction v"
            )
        self.alpha_bars: Tensor = DDPMScheduler(**given).alphas_cumprod
        self.steps = len(self.alpha_bars)  # `trained_betas` need not be num_train_timesteps long

    def draw(self, stage: Stage, generator: torch.Generator) -> float:
        first, end = self.steps_of(stage)
        if first >= end:
            raise no_mass([stage])
        return int(torch.randint(first, end, (), generator=generator))

    def mass(self, stage: Stage) -> float:
        first, end = self.steps_of(stage)
        return max(end - first, 0) / self.steps

    def alpha_bar(self, time: Tensor) -> Tensor:
        if self.alpha_bars.device != time.device:
            self.alpha_bars = self.alpha_bars.to(time.device)
        return self.alpha_bars[time]

    def steps_of(self, stage: Stage) -> tuple[int, int]:
        """The steps [first, end) whose level t / steps lies in the stage's [low, high)."""
        return math.ceil(stage.low * self.steps), math.ceil(stage.high * self.steps)


class CosineSchedule:
    """abar(t) = cos^2((t + s) / (1 + s) * pi/2), scaled to 1 at t = 0, for a time in (0, 1] of which 1 is noise."""

    dtype = torch.float32

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMWuerstchenScheduler

        name = scheduler_config.get("_class_name")
        if name != COSINE_SCHEDULER:
            raise ConfigError(
                f"the checkpoint's scheduler is {name}; this family is trained and sampled on the cosine of {COSINE_SCHEDULER}: use "
                "a checkpoint with that in its scheduler folder in spec.model"
            )
        config = DDPMWuerstchenScheduler.from_config(scheduler_config).config
        self._offset, self._scaler = float(config.s), float(config.scaler)

    def draw(self, stage: Stage, generator: torch.Generator) -> float:
        if stage.low >= stage.high:
            raise no_mass([stage])
        uniform = 1 - float(torch.rand((), generator=generator, dtype=torch.float64))  # (0, 1]
        # A time that is 0 in fp32 would lie outside of what is sampled.
        return max(stage.low + (stage.high - stage.low) * uniform, torch.finfo(self.dtype).tiny)

    def mass(self, stage: Stage) -> float:
        return max(stage.high - stage.low, 0.0)

    def alpha_bar(self, time: Tensor) -> Tensor:
        if self._scaler > 1:
            time = 1 - (1 - time) ** self._scaler
        elif self._scaler < 1:
            time = time**self._scaler
        quarter = math.pi / 2 / (1 + self._offset)
        signal = torch.cos((time + self._offset) * quarter).square() / math.cos(self._offset * quarter) ** 2
        return signal.clamp(LEAST_SIGNAL, MOST_SIGNAL)
