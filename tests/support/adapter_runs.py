"""A tiny denoiser of each family with inputs it understands, for tests of what is put on denoisers."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from atelier_runtime.adapters import trainable
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions, Family, Features
from family_models import TINY, tiny_pipeline

PROMPTS = ("a red fox", "fog")


@dataclass(frozen=True)
class FamilyCase:
    """`template` is the untouched denoiser, `channels` are those of its latents."""

    family: Family
    template: Any
    conditions: Conditions
    channels: int

    def denoiser(self) -> Any:
        """A fresh copy of the tiny denoiser."""
        return copy.deepcopy(self.template)

    def predict(self, model: Any, *, grad: bool = False) -> Tensor:
        """The prediction for fixed inputs, a batch of two prompts of different length."""
        facts = self.family.facts
        generator = torch.Generator().manual_seed(5)
        grid = {"image": (4, 4), "video": (2, 4, 4), "audio": (7,)}[facts.modality]
        noisy = torch.randn(2, self.channels, *grid, generator=generator)
        steps = facts.objective == "diffusion" and facts.noise_schedule == "betas"
        time = torch.tensor([200, 900]) if steps else torch.tensor([0.2, 0.9])
        with torch.set_grad_enabled(grad):
            return self.family.predict(model, noisy, time, self.conditions)

    @staticmethod
    def disturb(model: Any, seed: int = 0) -> None:
        """Draw new adapter weights, so that the adapter does something."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@cache
def family_case(name: str, checkpoint: str | None = None) -> FamilyCase:
    """The case of a family; `checkpoint` names another tiny pipeline of it."""
    family, pipe = get_family(name), tiny_pipeline(checkpoint or name)
    with torch.no_grad():
        text = family.collate_text(_features(family, pipe))
        shared = family.encode_shared(pipe) if family.shares else {}
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]]).repeat(len(PROMPTS), 1)
    channels = TINY[checkpoint or name].channels or family.facts.latent_channels
    return FamilyCase(family, getattr(pipe, family.denoisers[0]), Conditions(text, sizes, shared=shared), channels)


def _features(family: Family, pipe: Any) -> list[Features]:
    if family.text_sees_references:
        pictures = [[Image.new("RGB", (70, 48), colour)] for colour in ("red", "gray")]
        return family.encode_instructions(pipe, PROMPTS, pictures)
    return family.encode_text(pipe, PROMPTS)


def trained(model: Any) -> dict[str, Parameter]:
    """The parameters that an optimizer would be given."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
