"""Wan 2.2 TI2V-5B, image to video: flow matching on clips in a latent space of high compression, a time for each token.

Latents are [B, 48, (F - 1)/4 + 1, H/16, W/16]. The first frame is shown as the first latent, clean and at time 0, where the loss does
not count. Source: diffusers `pipelines/wan/pipeline_wan_i2v.py` with `expand_timesteps`. The network draws from text alone as well
(`pipeline_wan.py`), all tokens at one time: that is what `predict` does without frames.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Conditions, Features, Frame, SampleRequest, Stage, TimeEmbedder, configuration
from atelier_runtime.family_parts.shown_frames import mask_of_the_rest, with_shown
from atelier_runtime.family_parts.wan import WanNetwork, require_a_clip


class WanTI2V(WanNetwork):
    """Wan 2.2 TI2V-5B. Checkpoints of one time for all tokens are refused."""

    name = "wan_ti2v"
    pipeline = "WanImageToVideoPipeline"
    time_embedder = TimeEmbedder(
        "condition_embedder.time_embedder", "condition_embedder.timesteps_proj", scale=1000, rows="parts"
    )

    def pipeline_of(self, pipeline_config: Mapping[str, Any]) -> str:
        """That which is shown a picture: the published index names the one that draws from text alone."""
        return self.pipeline

    def given_frames(self, pipeline_config: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> tuple[Frame, ...]:
        """The first. Raises ConfigError for a checkpoint of another kind, as `stages` does."""
        _require_a_time_per_token(pipeline_config)
        return ("first",)

    def stages(self, pipeline_config: Mapping[str, Any], denoisers: Sequence[str]) -> tuple[Stage, ...]:
        _require_a_time_per_token(pipeline_config)
        return super().stages(pipeline_config, denoisers)

    def encode_frames(self, pipe: Any, pixels: Tensor, given: tuple[Frame, ...]) -> Features:
        """`first` [B, 48, 1, H, W]: the latent of the first frame alone."""
        require_a_clip(pixels)
        return {"first": self.encode_pixels(pipe, pixels[:, :, :1]).mean}

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 48, F, H, W], of no meaning where a frame is shown; `time` is [B], or [B, tokens]."""
        _, height, width = configuration(denoiser).patch_size
        in_a_frame = (noisy.shape[-2] // height) * (noisy.shape[-1] // width)
        times = time if time.ndim == 2 else time[:, None].expand(-1, noisy.shape[2] * in_a_frame)
        if conditions.frames is not None:
            noisy = with_shown(noisy, conditions)
            times = torch.cat([torch.zeros_like(times[:, :in_a_frame]), times[:, in_a_frame:]], dim=1)
        embeds = conditions.text["embeds"].to(noisy.dtype)
        return denoiser(noisy, times * 1000, embeds, return_dict=False)[0]

    def loss_mask(self, latents: Tensor, conditions: Conditions) -> Tensor | None:
        return mask_of_the_rest(latents, conditions)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        pictures = dict(zip(("image",), request.pictures, strict=False))
        return super().sampling_arguments(pipe, request) | pictures


def _require_a_time_per_token(pipeline_config: Mapping[str, Any]) -> None:
    if not pipeline_config.get("expand_timesteps"):
        raise ConfigError(
            "spec.model.source is a checkpoint of one time for all tokens (no expand_timesteps in model_index.json); the family "
            "wan_ti2v trains Wan 2.2 TI2V-5B: set spec.model.family to wan, or spec.model.source to that"
        )


FAMILY = WanTI2V()
