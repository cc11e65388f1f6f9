"""A frozen base with its linear layers in few bits, below adapters that train in full precision (QLoRA, arXiv:2305.14314).

Each kind is a module of its name here, which holds `FORMAT`. It is imported where it is used alone: its library is optional.
"""

from importlib import import_module

import torch
from torch import nn

from atelier_api.errors import ConfigError
from atelier_api.quantizations import LIBRARIES, Quantization
from atelier_runtime.family import Family
from atelier_runtime.quantization.format import Format
from atelier_runtime.quantization.layer import QuantizedLinear
from atelier_runtime.quantization.layers import parameter_sizes, quantized_layers

__all__ = ["Format", "QuantizedLinear", "load_format", "parameter_sizes", "quantize", "quantized_layers"]


def load_format(kind: Quantization) -> Format:
    """The format of that name. Raises ConfigError where its library is not installed, or cannot be loaded here."""
    try:
        found: Format = import_module(f"{__name__}.{kind}").FORMAT
    except (ImportError, OSError) as error:  # OSError: a shared object of the library does not load
        raise ConfigError(
            f"spec.model.quantization is {kind!r}, which needs {LIBRARIES[kind]}, and that cannot be imported here ({error}); "
            "install 'atelier-training[quantization]', or remove spec.model.quantization"
        ) from error
    return found


def quantize(denoiser: nn.Module, kind: Quantization, family: Family, device: torch.device) -> nn.Module:
    """Replace the denoiser's linear layers by quantised ones, in place, and bring it all to `device`. Before adapters go on.

    Layer by layer: weights in full precision are on `device` one at a time. Raises ConfigError where no layer is left to quantise.
    """
    form, names = load_format(kind), quantized_layers(denoiser, family)
    if not names:
        raise ConfigError(
            f"spec.model.quantization is {kind!r}, but the blocks of {family.name} have no linear layer to quantise; remove it"
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, QuantizedLinear(denoiser.get_submodule(name), form, device))
    return denoiser.to(device)
