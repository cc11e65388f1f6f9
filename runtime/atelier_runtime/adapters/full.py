"""Full-rank training: the denoiser's own weights."""

import re

from torch import nn

from atelier_api.errors import ConfigError
from atelier_runtime.adapters.report import AdapterReport, report
from atelier_runtime.family import Family


def install_full(denoiser: nn.Module, family: Family) -> AdapterReport:
    """Let every parameter train but those that no gradient reaches. Weights keep the dtype they were loaded in.

    Parameters without a gradient would make DistributedDataParallel fail in its second step; those of layers whose output is thrown
    away would take memory in the optimizer, and only decay.
    """
    modules: dict[str, int] = {}
    dead = tuple(f"{name}." for name in family.dead_modules(denoiser))
    for name, parameter in denoiser.named_parameters():
        frozen = any(re.fullmatch(expression, name) for expression in family.frozen_parameters)
        trained = not frozen and not name.startswith(dead)
        parameter.requires_grad_(trained)
        if trained:
            child = name.split(".")[0]
            modules[child] = modules.get(child, 0) + 1
    if not modules:
        raise ConfigError(
            f"spec.adapter.type is 'full', but every parameter of the denoiser is frozen by family {family.name}; use type 'lora'"
        )
    denoiser.train()
    return report(denoiser, modules)
