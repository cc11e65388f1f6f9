"""Latents whose channels an autoencoder's config describes, each by a mean and a deviation."""

from typing import Any

import torch
from torch import Tensor


def standardised(vae: Any, latents: Tensor) -> Tensor:
    """(latents - mean) / deviation, of [B, C, ...]; `latents_mean` and `latents_std` of the config have a number for each channel."""
    mean, deviation = statistics(vae, latents)
    return (latents - mean) / deviation


def statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels, in a shape that broadcasts to `latents`, [B, C, ...]."""
    shape = [1, -1, *[1] * (latents.ndim - 2)]
    mean, deviation = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation
