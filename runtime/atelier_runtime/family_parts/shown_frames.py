"""First frames of a clip that the network is shown as the first latents, clean: it draws the rest, and the loss is on the rest."""

import torch
from torch import Tensor

from atelier_runtime.family import Conditions


def with_shown(noisy: Tensor, conditions: Conditions) -> Tensor:
    """`noisy` [B, C, F, H, W] with the latents that `conditions` show in their place; as it is where they show none."""
    if conditions.frames is None:
        return noisy
    first = conditions.frames["first"].to(noisy.dtype)
    return torch.cat([first, noisy[:, :, first.shape[2] :]], dim=2)


def mask_of_the_rest(latents: Tensor, conditions: Conditions) -> Tensor | None:
    """[1, 1, F, 1, 1], 0 for the latents that are shown; None where none are."""
    if conditions.frames is None:
        return None
    mask = latents.new_ones(1, 1, latents.shape[2], 1, 1)
    mask[:, :, : conditions.frames["first"].shape[2]] = 0
    return mask
