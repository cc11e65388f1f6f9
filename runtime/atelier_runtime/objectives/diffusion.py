"""Diffusion: x_t = a x0 + b eps, a^2 = abar_t, b^2 = 1 - abar_t; target eps, or v = a eps - b x0 (arXiv:2202.00512)."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Objective as ObjectiveSpec
from atelier_runtime.family import Stage
from atelier_runtime.objectives.bridge import FlowTimes, flow_weight
from atelier_runtime.objectives.noise_schedules import BetaSchedule, CosineSchedule, NoiseSchedule
from atelier_runtime.objectives.objective import (
    Objective,
    Prepared,
    check_generators,
    draw_noise,
    per_sample,
    to_device,
)
from atelier_runtime.objectives.timesteps import build_density, resolve_shift

log = logging.getLogger(__name__)


class DiffusionObjective(Objective):
    """Epsilon or v prediction at a uniform time of the checkpoint's own noise schedule, or with Diff2Flow at one of flow matching."""

    def __init__(self, spec: ObjectiveSpec, facts: FamilyFacts, scheduler_config: Mapping[str, Any]) -> None:
        super().__init__(spec)
        self.prediction = resolve_prediction(spec.prediction, scheduler_config)
        if facts.noise_schedule == "cosine":
            self.schedule: NoiseSchedule = CosineSchedule(scheduler_config)
            return
        betas = BetaSchedule(
            scheduler_config, zero_terminal_snr=spec.noise.zero_terminal_snr, prediction=self.prediction
        )
        self.schedule = betas if spec.diff2_flow is None else self._flow_times(betas, facts)

    def prepare(self, clean: Tensor, generators: Sequence[torch.Generator], *, stage: Stage, tokens: int) -> Prepared:
        check_generators(clean, generators)
        times, noises = [], []
        for generator in generators:
            times.append(self.schedule.draw(stage, generator))
            noises.append(self._noise(clean.shape[1:], generator))
        time = to_device(torch.tensor(times, dtype=self.schedule.dtype), clean.device)
        noise = to_device(torch.stack(noises), clean.device)
        clean = clean.float()
        alpha_bar = self.schedule.alpha_bar(time)
        a, b = per_sample(alpha_bar**0.5, clean), per_sample((1 - alpha_bar) ** 0.5, clean)
        return Prepared(
            noisy=a * clean + b * noise,
            time=time,
            target=a * noise - b * clean if self.prediction == "v" else noise,
            weight=self._weight(alpha_bar),
        )

    def mass(self, stage: Stage, tokens: int) -> float:
        return self.schedule.mass(stage)

    def _noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        noise = draw_noise(shape, generator)
        if self.spec.noise.offset:
            per_channel = torch.Size([shape[0]] + [1] * (len(shape) - 1))
            noise = noise + self.spec.noise.offset * draw_noise(per_channel, generator)
        return noise

    def _flow_times(self, betas: BetaSchedule, facts: FamilyFacts) -> FlowTimes:
        # What a sampler's config says of shifts is about a flow of its own, not about these betas.
        shift = resolve_shift(self.spec.timesteps.shift, {}, facts.shift)
        times = FlowTimes(betas, build_density(self.spec.timesteps), shift.factor(tokens=0))
        weights = self._weight(times.alpha_bars.double())
        # The gradient grows with the mean: who clips it has to know.
        mean = float((times.probabilities * weights).sum())
        log.info("flow objective", extra={"mean_weight": mean, "largest_weight": float(weights.max())})
        return times

    def _weight(self, alpha_bar: Tensor) -> Tensor:
        """Weight [B] of the squared error; 1 when nothing is on.

        With Diff2Flow what makes it that of the velocity. Min-SNR (arXiv:2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1)
        for v.
        """
        if self.spec.diff2_flow is not None:
            return flow_weight(alpha_bar, self.prediction, self.spec.diff2_flow.max_weight)
        gamma = self.spec.min_snr_gamma
        if gamma is None:
            return torch.ones_like(alpha_bar)
        snr = alpha_bar / (1 - alpha_bar)
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
