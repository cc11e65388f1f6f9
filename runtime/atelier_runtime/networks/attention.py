"""Attention of networks that diffusers lacks."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Autocast off. The meta device, on which sizes are measured, has none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, C] to [B, heads, N, C / heads]."""
    return torch.unflatten(tokens, -1, (heads, -1)).transpose(1, 2)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, heads, N, D] to [B, heads, L, D], heads joined again: [B, N, C].

    `mask` broadcasts to [B, heads, N, L]: true where there is attention, or numbers that are added to the scores.
    """
    # Norms with weights in fp32 leave query and key in it, where autocast has made the value bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
