"""What is trained: adapters on a denoiser, the denoiser itself, or a control network beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from atelier_api.v1alpha1.adapter import Adapter, ControlNetAdapter
from atelier_runtime.adapters.controlnet import build_control_network
from atelier_runtime.adapters.full import install_full
from atelier_runtime.adapters.lora import ADAPTER_NAME, install_lora
from atelier_runtime.adapters.report import AdapterReport, Draw, Encode
from atelier_runtime.adapters.strength import at_strength
from atelier_runtime.adapters.targets import resolve_targets
from atelier_runtime.adapters.textual_inversion import install_tokens, show_tokens
from atelier_runtime.family import Family

__all__ = [
    "ADAPTER_NAME",
    "AdapterReport",
    "Draw",
    "Encode",
    "at_strength",
    "build_control_network",
    "install",
    "resolve_targets",
    "show_tokens",
    "trainable",
]


def install(
    denoiser: nn.Module,
    adapter: Adapter,
    family: Family,
    *,
    dtype: torch.dtype = torch.float32,
    load_encoders: Callable[[], Any] | None = None,
) -> AdapterReport:
    """Make `denoiser` trainable as `adapter` says, and put it in training mode. To be called once, before sharding.

    `dtype` is that of the adapter's weights; full-rank weights keep theirs. `load_encoders` gives the stock pipeline
    with its text encoders, for an adapter that trains what they read. Raises ConfigError where nothing would be trained.
    """
    if isinstance(adapter, ControlNetAdapter):
        raise ValueError("a control network is put on no denoiser: build_control_network makes it")
    if adapter.type == "full":
        return install_full(denoiser, family)
    if adapter.type == "lora":
        return install_lora(denoiser, adapter, family, dtype=dtype)
    if adapter.type == "textual-inversion":
        if load_encoders is None:
            raise ValueError("textual inversion needs the text encoders, and was given none")
        return install_tokens(denoiser, load_encoders(), adapter, family, dtype=dtype)
    from atelier_runtime.adapters.lycoris import install_lycoris  # its library is read only where it is used

    return install_lycoris(denoiser, adapter, family, dtype=dtype)


def trainable(denoiser: nn.Module) -> dict[str, Parameter]:
    """The parameters that train, by full name."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
