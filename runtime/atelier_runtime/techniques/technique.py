"""What every technique does: it looks at a pass of the denoiser, and gives a loss beside the objective's."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atelier_runtime.family import Conditions


@dataclass(frozen=True)
class Pass:
    """One micro-batch of B that has gone through the denoiser, be it in one call or in B.

    `latents` are clean, [B, C, ...]; `mask` is what `Family.loss_mask` gives for them.
    """

    latents: Tensor
    conditions: Conditions
    mask: Tensor | None


class Technique(ABC):
    """One technique of a run. `build_techniques` makes it."""

    name: ClassVar[str]
    """Its key in `spec.techniques`, and its label in the metrics."""

    def watching(self) -> AbstractContextManager[None]:
        """A context around the calls of the denoiser in a pass. What the backward pass computes again is outside of it."""
        return nullcontext()

    @abstractmethod
    def loss(self, seen: Pass) -> Tensor:
        """[B] fp32, its weight included: what is added to the objective's loss. Asked once after each pass that was watched."""
