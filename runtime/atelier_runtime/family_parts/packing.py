"""Latents as tokens: patches of some pixels, a vector each."""

import torch.nn.functional as F
from torch import Tensor


def packed(latents: Tensor, patch: int = 2) -> Tensor:
    """[B, tokens, C patch^2] of [B, C, H, W]: patches row by row, of each the channels first."""
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)
