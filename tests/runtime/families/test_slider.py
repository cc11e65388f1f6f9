"""A slider on every family: what an adapter does at a strength, and what it learns there."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.v1alpha1.adapter import LokrAdapter, LoraAdapter
from atelier_runtime import adapters
from family_cases import CASES, PROMPTS
from shared_cases import shared_case

LEVELS = (0.3, 0.9)
SLIDERS: tuple[tuple[Any, str], ...] = (
    (LoraAdapter(rank=4, slider=True, targets=["all"]), ".lora_B."),
    (LokrAdapter(type="lokr", factor=2, slider=True, targets=["all"]), ".lokr_w2"),
)
"""Adapters, and what the name of the second matrix of their products has in it."""


@pytest.mark.cell("slider")
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_at_strength_minus_k_is_one_of_that_scale_and_at_0_it_is_the_base(name: str) -> None:
    case = shared_case(name)
    conditions = case.conditions(PROMPTS)

    def predicted(denoiser: nn.Module) -> tuple[Tensor, Tensor]:
        noisy, time, target = case.noised(case.latents(len(LEVELS)), LEVELS)
        return case.family.predict(denoiser, noisy, time, conditions), target

    for denoiser in case.denoisers.values():
        with torch.no_grad():
            base, _ = predicted(denoiser)
        for adapter, second in SLIDERS:
            model = copy.deepcopy(denoiser)
            adapters.install(model, adapter, case.family)
            for parameter in adapters.trainable(model).values():
                nn.init.normal_(parameter, std=0.1)

            def trained_at(strength: float, model: nn.Module = model) -> tuple[Tensor, dict[str, Tensor]]:
                model.zero_grad()
                with adapters.at_strength([model], strength):
                    prediction, target = predicted(model)
                    case.loss(prediction, target, conditions).backward()
                return prediction.detach(), {
                    n: p.grad for n, p in adapters.trainable(model).items() if p.grad is not None
                }

            prediction, gradients = trained_at(0.0)
            torch.testing.assert_close(prediction, base, atol=1e-5, rtol=1e-5)
            assert gradients.keys() == adapters.trainable(model).keys()
            assert not any(gradient.any() for gradient in gradients.values())
            prediction, gradients = trained_at(-1.5)
            with torch.no_grad():  # the same scale in the second matrix of each product, whose gradient it divides
                for key, parameter in adapters.trainable(model).items():
                    parameter *= -1.5 if second in key else 1.0
            expected, expected_gradients = trained_at(1.0)
            torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-4)
            for key, gradient in gradients.items():  # a wrong strength is far off: a thousandth is what fp32 needs
                found = gradient / -1.5 if second in key else gradient
                assert (found - expected_gradients[key]).norm() <= 1e-3 * expected_gradients[key].norm(), key
