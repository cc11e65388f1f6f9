"""Which layers of a denoiser are quantised, and how many parameters one has that is."""

import re
from collections.abc import Iterator

from torch import nn

from atelier_runtime.family import Family
from atelier_runtime.quantization.layer import PREFIX, QuantizedLinear


def quantized_layers(denoiser: nn.Module, family: Family) -> list[str]:
    """Full names of the plain linear layers inside the family's blocks, but for those that stay as they are.

    Outside the blocks lie the embedders and the last layer: little memory, and every error of theirs reaches the whole picture.
    Inside stay norms and convolutions, what the model's class keeps in fp32, and `family.unquantized`. Subclasses of the linear
    layer stay too: whoever made one reads its weight in a way of his own (as nn.MultiheadAttention does).
    """
    inside = tuple(f"{part.attribute}." for part in family.blocks)
    in_fp32 = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, module in denoiser.named_modules()
        if type(module) is nn.Linear
        and name.startswith(inside)
        and not in_fp32 & set(name.split("."))
        and not any(re.fullmatch(expression, name) for expression in family.unquantized)
    ]


def parameter_sizes(denoiser: nn.Module) -> Iterator[tuple[int, bool]]:
    """Number of values of each parameter, and whether it trains; a packed weight counts as what it stands for."""
    layers = [module for module in denoiser.modules() if isinstance(module, QuantizedLinear)]
    packed = {id(p) for layer in layers for name, p in layer.named_parameters() if name.startswith(PREFIX)}
    yield from ((p.numel(), p.requires_grad) for p in denoiser.parameters() if id(p) not in packed)
    yield from ((layer.out_features * layer.in_features, False) for layer in layers)
