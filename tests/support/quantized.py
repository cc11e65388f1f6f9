"""Quantised denoisers beside what they are compared with."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.families import FAMILIES
from atelier_api.quantizations import Quantization
from atelier_runtime.family import Family
from atelier_runtime.quantization import QuantizedLinear, quantize, quantized_layers
from family_models import FAMILY_OF

CPU = torch.device("cpu")
FEW = ("flux", "sdxl", "wan", "hidream")
"""Two kinds of transformer blocks, a UNet, a video transformer that keeps layers in fp32, routed experts."""
NEAR: dict[Quantization, float] = {"int8": 0.01, "fp8": 0.05, "nf4": 0.2}
"""How far a prediction of a tiny denoiser may move, as a fraction of it. One layer's bound is in test_formats."""


def _pairs(name: str) -> list[Any]:
    """Of a tiny pipeline with each kind that its family may have; skipped where that is none."""
    facts, marks = FAMILIES[FAMILY_OF[name]], () if name in FEW else (pytest.mark.sweep,)
    if not facts.quantizations:
        reason = pytest.mark.skip(reason=facts.quantization_doubt)
        return [pytest.param((name, None), marks=reason, id=f"{name}-none")]
    return [pytest.param((name, kind), marks=marks, id=f"{name}-{kind}") for kind in facts.quantizations]


EVERY_PAIR = [pair for name in FAMILY_OF for pair in _pairs(name)]
"""Tiny pipelines and kinds."""


def quantized(denoiser: nn.Module, kind: Quantization, family: Family) -> nn.Module:
    """A quantised copy."""
    return quantize(copy.deepcopy(denoiser), kind, family, CPU)


def unpacked(denoiser: nn.Module, quantised: nn.Module) -> nn.Module:
    """A plain copy of `denoiser` with the very weights that `quantised` multiplies with."""
    plain = copy.deepcopy(denoiser)
    for name, layer in quantized_modules(quantised).items():
        plain.get_submodule(name).weight.data = layer.weight
    return plain


def quantized_modules(denoiser: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers, by name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedLinear)}


def quantized_names(denoiser: nn.Module, family: Family) -> set[str]:
    """The layers that would be quantised."""
    return set(quantized_layers(denoiser, family))


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, as a fraction of the norm of what is expected."""
    return float((found - expected).float().norm() / expected.float().norm())


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by name of parameter, of those that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
