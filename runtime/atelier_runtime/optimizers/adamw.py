"""The optimizer of a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_runtime.optimizers.bf16 import AdamWBf16
from atelier_runtime.optimizers.fused import FusedAdamW
from atelier_runtime.optimizers.shards import is_sharded


def build_optimizer(
    parameters: Sequence[Parameter], hyperparameters: Hyperparameters, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW over the parameters, with its state already made: a resume has something to load into, memory is flat from the start.

    `adamw` is the one of torch, fused (one pass over memory, no temporaries). Raises ValueError for `adamw` on weights that are not
    fp32: its moments would silently be as coarse as the weights.
    """
    options = hyperparameters.optimizer
    # A fused or foreach call cannot mix sharded and whole tensors: each kind is a group of its own.
    kinds = [[p for p in parameters if is_sharded(p) == sharded] for sharded in (False, True)]
    groups = [{"params": kind} for kind in kinds if kind]
    numbers: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    if options.type == "adamw-bf16":
        return AdamWBf16(groups, seed=hyperparameters.seed, **numbers)
    coarse = {parameter.dtype for parameter in parameters} - {torch.float32}
    if coarse:
        raise ValueError(f"adamw trains fp32 weights, not {', '.join(map(str, coarse))}")
    return FusedAdamW(groups, **numbers)
