"""A control network beside a frozen denoiser (ControlNet, arXiv:2302.05543)."""

import torch
from torch import nn

from atelier_api.errors import ConfigError
from atelier_runtime.adapters.report import AdapterReport, report
from atelier_runtime.family import Family


def build_control_network(
    denoiser: nn.Module, family: Family, *, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, AdapterReport]:
    """A control network of `denoiser`, which it leaves as it is: trainable but for what no gradient reaches, in training mode.

    What is no copy, is drawn from torch's global generator. Raises ConfigError for a denoiser that has nothing to copy.
    """
    if family.control is None:
        raise ValueError(f"spec.adapter.type is 'controlnet' for {family.name}, and was not refused")
    try:
        network = family.control.copied(denoiser).to(device, dtype)
    except ValueError as error:
        raise ConfigError(f"spec.adapter.type is 'controlnet', and {error}; use type 'lora'") from error
    unused = family.control.unused(network)
    modules: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        trained = not any(name == each or name.startswith(f"{each}.") for each in unused)
        parameter.requires_grad_(trained)
        if trained:
            child = name.split(".")[0]
            modules[child] = modules.get(child, 0) + 1
    network.train()
    return network, report(network, modules)
