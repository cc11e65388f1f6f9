"""Clipping by the norm of the whole gradient, over plain and sharded parameters together."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from atelier_runtime.optimizers.shards import any_sharded, is_sharded, local, sum_over_shards


@torch.no_grad()
def clip_gradients(parameters: Iterable[Parameter], max_norm: float | None) -> Tensor:
    """The L2 norm of all gradients before clipping, a 0-d fp32 tensor on their device; scales them in place to at most `max_norm`.

    `max_norm` None only measures. Nothing here waits for the device; one all-reduce of one number where gradients are sharded.
    A norm that is not finite makes the gradients not finite. Raises ValueError without any gradient.
    """
    gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient")
    whole: list[Tensor] = gradients
    sharded: list[Tensor] = []
    if any_sharded(gradients):
        whole = [gradient for gradient in gradients if not is_sharded(gradient)]
        sharded = [gradient for gradient in gradients if is_sharded(gradient)]
    shards = [local(gradient) for gradient in sharded]
    square = _square_sum(whole, gradients[0].device)
    if sharded:
        square = square + sum_over_shards(_square_sum(shards, square.device), sharded[0])
    norm = square.sqrt()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*whole, *shards], factor)
    return norm


def _square_sum(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()
