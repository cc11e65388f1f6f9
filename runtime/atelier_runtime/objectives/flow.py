"""Flow matching: x_s = (1 - s) x0 + s eps, target eps - x0 (arXiv:2210.02747, arXiv:2209.03003)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atelier_api.v1alpha1.objective import Objective as ObjectiveSpec
from atelier_runtime.family import Stage
from atelier_runtime.objectives.objective import (
    Objective,
    Prepared,
    check_generators,
    draw_noise,
    per_sample,
    to_device,
)
from atelier_runtime.objectives.timesteps import Shift, build_density, draw_sigma, range_probabilities


class FlowObjective(Objective):
    """Velocity prediction at sigma drawn from a shifted density."""

    def __init__(self, spec: ObjectiveSpec, shift: Shift) -> None:
        super().__init__(spec)
        self.density = build_density(spec.timesteps)
        self.shift = shift

    def prepare(self, clean: Tensor, generators: Sequence[torch.Generator], *, stage: Stage, tokens: int) -> Prepared:
        check_generators(clean, generators)
        k = self.shift.factor(tokens)
        sigmas, noises = [], []
        for generator in generators:
            sigmas.append(draw_sigma(self.density, k, stage, generator))
            noises.append(draw_noise(clean.shape[1:], generator))
        sigma = to_device(torch.tensor(sigmas, dtype=torch.float32), clean.device)
        noise = to_device(torch.stack(noises), clean.device)
        clean = clean.float()
        level = per_sample(sigma, clean)
        return Prepared(
            noisy=(1 - level) * clean + level * noise,
            time=sigma,
            target=noise - clean,
            weight=torch.ones_like(sigma),
        )

    def mass(self, stage: Stage, tokens: int) -> float:
        below, up_to = range_probabilities(self.density, self.shift.factor(tokens), stage)
        return up_to - below
