"""What every objective does: noisy input and target out of clean latents, and the loss of a prediction.

Randomness comes only from the CPU generator of each sample, so a sample's draw does not depend on the batch, rank or world size it
is drawn in. The order of draws is part of the contract (noise level, noise, offset): resuming and comparing runs rest on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atelier_api.v1alpha1.objective import Objective as ObjectiveSpec
from atelier_runtime.family import Stage
from atelier_runtime.objectives.losses import pseudo_huber, squared_error
from atelier_runtime.objectives.timesteps import SMALLEST_MASS, no_mass
from atelier_runtime.run_network import RunNetwork


@dataclass(frozen=True)
class Prepared:
    """One micro-batch, ready for `Family.predict`: everything is fp32 but DDPM steps.

    `noisy` and `target` have the shape of the clean latents; `time` is [B], sigma for flow and for diffusion the DDPM step (long), or
    of a cosine schedule the time in (0, 1] (fp32); `weight` is [B].
    """

    noisy: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor


class Objective(ABC):
    """One training objective. `build_objective` makes it."""

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec

    @abstractmethod
    def prepare(self, clean: Tensor, generators: Sequence[torch.Generator], *, stage: Stage, tokens: int) -> Prepared:
        """Noise `clean` [B, C, ...] with one CPU generator per sample, at times inside the stage's range.

        `tokens` is the number of target tokens of a sample, for the dynamic shift.
        """

    @abstractmethod
    def mass(self, stage: Stage, tokens: int) -> float:
        """Probability in [0, 1] that a noise level drawn without stages lies in the stage's range."""

    def pick_stage(self, stages: Sequence[Stage], generator: torch.Generator, *, tokens: int) -> Stage:
        """A stage, in proportion to the mass of its range. A single stage is returned without a draw.

        Raises ConfigError where no stage has any mass.
        """
        if len(stages) == 1:
            return stages[0]
        masses = torch.tensor([self.mass(stage, tokens) for stage in stages], dtype=torch.float64)
        masses[masses < SMALLEST_MASS] = 0
        if not masses.any():
            raise no_mass(stages)
        return stages[int(torch.multinomial(masses, 1, generator=generator))]

    def losses(self, network: RunNetwork, prepared: Prepared, mask: Tensor | None) -> Tensor:
        """[B] fp32: asks the network for the prediction that is trained, once, and gives its `loss`."""
        return self.loss(network.predict(prepared.noisy, prepared.time), prepared, mask)

    def loss(self, prediction: Tensor, prepared: Prepared, mask: Tensor | None = None) -> Tensor:
        """[B] fp32: loss per element in fp32, mean over all but the batch, times the objective's weight.

        With a `mask` of 0 and 1 that broadcasts to the prediction, the mean is over what it leaves.
        """
        difference = prediction.float() - prepared.target
        if self.spec.loss == "huber":
            element = pseudo_huber(difference, self.spec.huber_c)
        else:
            element = squared_error(difference)
        if mask is None:
            return element.flatten(1).mean(1) * prepared.weight
        mask = mask.expand_as(element)
        return (element * mask).flatten(1).sum(1) / mask.flatten(1).sum(1) * prepared.weight


def check_generators(clean: Tensor, generators: Sequence[torch.Generator]) -> None:
    """Raise ValueError unless there is one generator per sample; a single one would be broadcast over the batch unnoticed."""
    if len(generators) != len(clean):
        raise ValueError(f"{len(generators)} generators for {len(clean)} samples")


def draw_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard normal fp32 noise of one sample, on the CPU whatever trains, so that every device sees the same."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the device: a copy from pageable memory would."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to broadcast over `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
