"""Tiny pipelines with a control network beside the denoiser, for tests: what the conformance suite asks, and conditions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from atelier_runtime import adapters, components
from atelier_runtime.control import CONTROL_NETWORK, Control, Controlled
from atelier_runtime.data.buckets import place_whole
from atelier_runtime.data.image import fit
from atelier_runtime.families import FAMILIES
from atelier_runtime.family import Conditions, SampleRequest
from family_cases import CASES, Case, photographs
from family_models import FAMILY_OF
from shared_cases import SharedCase, shared_case

CONTROLLED = [name for name in CASES if FAMILIES[FAMILY_OF[name]].control is not None]


@dataclass(frozen=True)
class ControlledCase(SharedCase):
    """A tiny pipeline that samples with a control network. Its denoiser is called together with that."""

    network: nn.Module

    @property
    def control(self) -> Control:
        assert self.family.control is not None
        return self.family.control

    @property
    def base(self) -> nn.Module:
        return next(iter(self.denoisers.values()))

    @property
    def together(self) -> Controlled:
        together = Controlled(self.base, self.network, self.control)
        together.train(self.network.training)
        return together

    def denoiser_at(self, sigma: float) -> nn.Module:
        return self.together

    def conditions(
        self, prompts: Sequence[str | None], guidance: float | None = None, samples: Sequence[int] | None = None
    ) -> Conditions:
        """With the conditioning pictures of these samples (0, 1, … unless told)."""
        numbers = list(range(len(prompts)) if samples is None else samples)
        return replace(super().conditions(prompts, guidance, samples), control=self.condition(numbers))

    def condition(self, numbers: Sequence[int]) -> Tensor:
        """What the network is given of these samples' pictures."""
        return conditions_of(self, numbers)

    def picture(self, number: int) -> Image.Image:
        """The conditioning picture of a sample, in its size."""
        return conditioning_picture(number, self.tiny.width, self.tiny.height)

    def request(self, guidance: float | None, steps: int = 4) -> SampleRequest:
        return replace(super().request(guidance, steps), condition=self.picture(0))


def conditions_of(case: Case, numbers: Sequence[int]) -> Tensor:
    """What the network is given of the conditioning pictures of samples with these numbers."""
    return condition_of(case, [conditioning_picture(number, case.tiny.width, case.tiny.height) for number in numbers])


def condition_of(case: Case, pictures: Sequence[Image.Image]) -> Tensor:
    """What a network of the case's kind is given of pictures of one size."""
    pixels = torch.stack([fit(each, place_whole(*each.size)) for each in pictures])
    assert case.family.control is not None
    if case.family.control.takes == "pixels":
        return (pixels + 1) / 2
    with torch.no_grad():
        return case.family.encode_condition(case.pipe, pixels).mean.float()


def conditioning_picture(number: int, width: int, height: int) -> Image.Image:
    """Another cut of a photograph for each number."""
    left, top = 9 * number, 5 * number + 8
    return photographs()[(number + 1) % 2].crop((left, top, left + width, top + height))


def controlled_case(name: str, *, trained: bool) -> ControlledCase:
    """A control network at its start, or with weights that training might have made, in the pipeline that samples with one."""
    case = shared_case(name)
    for module in case.denoisers.values():
        module.requires_grad_(False)
    network = control_network(case, trained=trained)
    control: Any = case.family.control
    parts = {**case.pipe.components, CONTROL_NETWORK: network}
    pipe = components.class_named(control.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return ControlledCase(name, pipe, case.family, network.eval())


def control_network(case: Case, *, trained: bool) -> nn.Module:
    torch.manual_seed(0)
    device = torch.device("cpu")
    base = next(iter(case.denoisers.values()))
    network, _ = adapters.build_control_network(base, case.family, dtype=torch.float32, device=device)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapters.trainable(network).values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network
