"""What an adapter has put on a denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from atelier_runtime.family import Features
from atelier_runtime.quantization import parameter_sizes

Draw = Callable[[torch.Generator], None]
"""Draws what an adapter draws once for a whole step, from the step's own generator."""

Encode = Callable[[Sequence[str]], Features]
"""Features of captions, [B, ...], with gradients into what the adapter trains."""


@dataclass(frozen=True)
class AdapterReport:
    """`trainable` and `total` count parameters; `modules` counts the trained modules by pattern of their names.

    `draw` is to be called before each step, where the adapter draws anything. `encode` is what captions go through in the step, where
    the adapter trains what reads them.
    """

    trainable: int
    total: int
    modules: dict[str, int]
    draw: Draw | None = None
    encode: Encode | None = None


def report(
    denoiser: nn.Module, modules: dict[str, int], *, draw: Draw | None = None, encode: Encode | None = None
) -> AdapterReport:
    """The report on `denoiser` as it is now."""
    sizes = list(parameter_sizes(denoiser))
    trained = sum(n for n, trained in sizes if trained)
    return AdapterReport(trained, sum(n for n, _ in sizes), modules, draw, encode)
