"""What an adapter has put on a denoiser."""

from dataclasses import dataclass

from torch import nn

from atelier_runtime.quantization import parameter_sizes


@dataclass(frozen=True)
class AdapterReport:
    """`trainable` and `total` count parameters; `modules` counts the trained modules by pattern of their names."""

    trainable: int
    total: int
    modules: dict[str, int]


def report(denoiser: nn.Module, modules: dict[str, int]) -> AdapterReport:
    """The report on `denoiser` as it is now."""
    sizes = list(parameter_sizes(denoiser))
    return AdapterReport(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes), modules)
