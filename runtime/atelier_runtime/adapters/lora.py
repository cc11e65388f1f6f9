"""LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353) and rank-stabilised LoRA (arXiv:2312.03732), all by peft."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_runtime.adapters.report import AdapterReport, report
from atelier_runtime.adapters.targets import resolve_targets
from atelier_runtime.family import Family
from atelier_runtime.module_names import count_by_pattern, matching_expression
from atelier_runtime.quantization import unpacked_once

ADAPTER_NAME = "default"


def install_lora(denoiser: nn.Module, adapter: LoraAdapter, family: Family, *, dtype: torch.dtype) -> AdapterReport:
    """Put LoRA matrices in `dtype` on the targets and freeze all else.

    The start values are drawn from torch's global generator. The output does not change: the second matrix starts at zero, and
    the magnitude of DoRA at the norm of the weight. Raises ConfigError where a target matches nothing.
    """
    modules = resolve_targets(denoiser, adapter.targets, family)
    # By peft itself, since not every class of diffusers has the method for it.
    with unpacked_once():
        inject_adapter_in_model(lora_config(adapter, matching_expression(modules)), denoiser, adapter_name=ADAPTER_NAME)
    for name, parameter in denoiser.named_parameters():
        trained = f".{ADAPTER_NAME}." in f"{name}."
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.to(dtype)
    denoiser.train()  # for the dropout in front of the first matrix, and what a denoiser has of its own
    return report(denoiser, count_by_pattern(modules))


def lora_config(adapter: LoraAdapter, target_modules: str) -> LoraConfig:
    """peft's form of `adapter` for the modules that the regular expression `target_modules` fully matches."""
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        init_lora_weights=True if adapter.init == "default" else "gaussian",
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        target_modules=target_modules,
    )
