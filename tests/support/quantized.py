"""Quantised denoisers beside what they are compared with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.quantizations import Quantization
from atelier_runtime.family import Family
from atelier_runtime.quantization import QuantizedLinear, quantize, quantized_layers

CPU = torch.device("cpu")


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
