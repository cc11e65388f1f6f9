"""LTX Video that is shown the first frame: the parts of LTX Video in a pipeline of its own."""

from dataclasses import replace

import torch
from diffusers import LTXImageToVideoPipeline
from torch import Tensor
from torch.nn import functional

from family_models import ltx
from family_models.kinds import Published


def tiny() -> LTXImageToVideoPipeline:
    """The posterior is narrow, as a trained one is: the pipeline draws the latent of its picture from it."""
    components = ltx.tiny().components
    last = components["vae"].encoder.conv_out.conv
    with torch.no_grad():
        last.weight[-1] = 0.0
        last.bias[-1] = -30.0
    return LTXImageToVideoPipeline(**components)


def unpacked(pipe: LTXImageToVideoPipeline, latents: Tensor) -> Tensor:
    """The pipeline's steps work on a grid without the frame that is shown."""
    return functional.pad(latents, (0, 0, 0, 0, 1, 0)) if latents.ndim == 5 else ltx.unpacked(pipe, latents)


TINY = {
    "ltx_i2v": replace(ltx.TINY["ltx"], make=tiny, to_grid=unpacked, from_grid=lambda _, grid: grid[:, :, 1:]),
}

PUBLISHED = Published(
    denoisers=ltx.PUBLISHED.denoisers,
    encoders=ltx.PUBLISHED.encoders,
    autoencoder=ltx.PUBLISHED.autoencoder,
)
