"""A frozen base with its linear layers in few bits, below adapters that train in full precision (QLoRA, arXiv:2305.14314)."""

import torch
from torch import nn

from atelier_api.errors import ConfigError
from atelier_api.quantizations import Quantization
from atelier_runtime.family import Family
from atelier_runtime.quantization.formats import FORMATS
from atelier_runtime.quantization.layer import QuantizedLinear, unpacked_once
from atelier_runtime.quantization.layers import parameter_sizes, quantized_layers

__all__ = ["FORMATS", "QuantizedLinear", "parameter_sizes", "quantize", "quantized_layers", "unpacked_once"]


def quantize(
    denoiser: nn.Module, kind: Quantization, family: Family, device: torch.device, *, home: torch.device | None = None
) -> nn.Module:
    """Replace the denoiser's linear layers by quantised ones, in place, and bring it all to `home` (default: `device`).

    Before adapters go on. Weights are packed on `device`, where one of them at a time is in full precision. Raises ConfigError where
    no layer is left to quantise.
    """
    home, names = home or device, quantized_layers(denoiser, family)
    if not names:
        raise ConfigError(
            f"spec.model.quantization is {kind!r}, but the blocks of {family.name} have no linear layer to quantise; remove it"
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        packed = QuantizedLinear(denoiser.get_submodule(name), FORMATS[kind], device)
        setattr(denoiser.get_submodule(parent), child, packed.to(home))
    return denoiser.to(home)
