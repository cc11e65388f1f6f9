"""LTX Video 0.9.0 and 0.9.1, image to video: the weights of `ltx`, shown the first frame.

It is the first latent, encoded alone and clean, and its tokens are at time 0; the loss is on the rest. Without a frame the prediction
is that from text alone. The pipeline draws the latent of its picture from the posterior, of which the mean is trained here. Source:
diffusers' `pipeline_ltx_image2video.py`; all else is in `atelier_runtime.family_parts.ltx`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Conditions, Features, Frame, SampleRequest, TimeEmbedder
from atelier_runtime.family_parts.ltx import LTXNetwork
from atelier_runtime.family_parts.shown_frames import mask_of_the_rest, with_shown


class LTXImageToVideo(LTXNetwork):
    name = "ltx_i2v"
    pipeline = "LTXImageToVideoPipeline"
    time_embedder = TimeEmbedder(
        "time_embed.emb.timestep_embedder", "time_embed.emb.time_proj", scale=1000, rows="parts"
    )

    def pipeline_of(self, pipeline_config: Mapping[str, Any]) -> str:
        """Always the one that is shown a picture: the published index names the one that draws from text alone."""
        return self.pipeline

    def given_frames(self, pipeline_config: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> tuple[Frame, ...]:
        return ("first",)

    def encode_frames(self, pipe: Any, pixels: Tensor, given: tuple[Frame, ...]) -> Features:
        """`first` [B, 128, 1, H, W]: the latent of the first frame alone. Raises ConfigError where there is no other."""
        if pixels.shape[2] == 1:
            raise ConfigError(
                "spec.data.clip.frames is 1, and the family ltx_i2v is shown the first frame of a clip to draw the rest; "
                "it must be 9 or more"
            )
        return {"first": self.encode_pixels(pipe, pixels[:, :, :1]).mean}

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 128, F, H, W], of no meaning where a frame is shown; `time` is [B], or [B, tokens]."""
        if conditions.frames is None:
            return super().predict(denoiser, noisy, time, conditions)
        in_a_frame = noisy.shape[-2] * noisy.shape[-1]
        times = time if time.ndim == 2 else time[:, None].expand(-1, noisy.shape[2] * in_a_frame)
        times = torch.cat([torch.zeros_like(times[:, :in_a_frame]), times[:, in_a_frame:]], dim=1)
        return super().predict(denoiser, with_shown(noisy, conditions), times, replace(conditions, frames=None))

    def loss_mask(self, latents: Tensor, conditions: Conditions) -> Tensor | None:
        return mask_of_the_rest(latents, conditions)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        pictures = dict(zip(("image",), request.pictures, strict=False))
        return super().sampling_arguments(pipe, request) | pictures


FAMILY = LTXImageToVideo()
