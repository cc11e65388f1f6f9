"""Wan 2.1 and 2.2, text to video and image to video: flow matching on clips.

Latents are [B, 16, (F - 1)/4 + 1, H/8, W/8]. Wan 2.2 has two experts: `transformer` for high noise, sigma in [boundary, 1], and
`transformer_2` for low noise; the boundary stands in `model_index.json`. Source: diffusers `pipelines/wan/pipeline_wan.py`.

Image-to-video checkpoints (`pipeline_wan_i2v.py`) are shown the first frame, FLF2V the last as well: 20 channels follow the noisy
ones, a mask [4] of the frames that are shown and the latents [16] of the clip with all others grey. Wan 2.1 also gets CLIP's view.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Conditions, Features, Frame, SampleRequest, Stage, TimeEmbedder, configuration
from atelier_runtime.family_parts.wan import WanNetwork, require_a_clip

FRAMES_OF_A_LATENT = 4  # after the first; the mask has a channel for each


class Wan(WanNetwork):
    """Wan 2.1 T2V, I2V and FLF2V, Wan 2.2 T2V-A14B and I2V-A14B. TI2V-5B is a family of its own."""

    name = "wan"
    pipeline = "WanPipeline"
    denoisers = ("transformer", "transformer_2")
    time_embedder = TimeEmbedder("condition_embedder.time_embedder", "condition_embedder.timesteps_proj", scale=1000)

    def given_frames(self, pipeline_config: Mapping[str, Any], denoiser_config: Mapping[str, Any]) -> tuple[Frame, ...]:
        """Raises ConfigError for TI2V-5B, as `stages` does."""
        _refuse_a_time_per_token(pipeline_config)
        if self.pipeline_of(pipeline_config) == self.pipeline:
            return ()
        # Only checkpoints for two pictures tell the tokens of one from those of the other, by position.
        return ("first", "last") if denoiser_config.get("pos_embed_seq_len") else ("first",)

    def stages(self, pipeline_config: Mapping[str, Any], denoisers: Sequence[str]) -> tuple[Stage, ...]:
        """One stage over (0, 1], or the two experts' ranges. Raises ConfigError for TI2V-5B and for experts without a boundary."""
        _refuse_a_time_per_token(pipeline_config)
        boundary = pipeline_config.get("boundary_ratio")
        if boundary is None:
            if len(denoisers) > 1:
                raise _refused(f"has the experts {', '.join(denoisers)} but no boundary_ratio in model_index.json")
            return (Stage(denoisers[0]),)
        ranges = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
        return tuple(Stage(name, *ranges[name]) for name in denoisers)

    def encode_frames(self, pipe: Any, pixels: Tensor, given: tuple[Frame, ...]) -> Features:
        """`latents` [B, 16, F, H, W] of the clip in which all other frames are grey, and CLIP's `image` [B, frames, tokens, D]."""
        require_a_clip(pixels)
        places = [{"first": 0, "last": -1}[frame] for frame in given]
        shown = torch.zeros_like(pixels)
        shown[:, :, places] = pixels[:, :, places]
        features = {"latents": self.encode_pixels(pipe, shown).mean}
        if pipe.image_encoder is not None:
            pictures = [_picture(clip[:, place]) for clip in pixels for place in places]
            features["image"] = pipe.encode_image(pictures, pixels.device).unflatten(0, (len(pixels), len(places)))
        return features

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, F, H, W]. Raises ConfigError where the network wants more than the checkpoint's pipeline gives."""
        config, frames = configuration(denoiser), conditions.frames or {}
        channels = noisy
        if frames:
            mask = _mask(noisy, last=bool(config.pos_embed_seq_len))
            channels = torch.cat([noisy, mask, frames["latents"].to(noisy.dtype)], dim=1)
        if config.in_channels != channels.shape[1]:
            raise _refused(
                f"has a denoiser of {config.in_channels} input channels and a pipeline of {channels.shape[1]}"
            )
        image = None
        if config.image_dim is not None:
            if "image" not in frames:
                raise _refused("has a denoiser that is shown pictures through CLIP, and no image_encoder")
            image = frames["image"].flatten(0, 1).to(noisy.dtype)
        embeds = conditions.text["embeds"].to(noisy.dtype)
        return denoiser(channels, time * 1000, embeds, image, return_dict=False)[0]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        pictures = dict(zip(("image", "last_image"), request.pictures, strict=False))
        return super().sampling_arguments(pipe, request) | pictures


def _mask(latents: Tensor, *, last: bool) -> Tensor:
    """[B, 4, F, H, W], 1 for the frames that are shown; the first latent stands for one frame, which counts four times."""
    mask = latents.new_zeros(len(latents), FRAMES_OF_A_LATENT, *latents.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return mask


def _picture(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] as CLIP's own preparation takes them."""
    values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def _refuse_a_time_per_token(pipeline_config: Mapping[str, Any]) -> None:
    if pipeline_config.get("expand_timesteps"):
        raise _refused(
            "is a checkpoint with a time per token (expand_timesteps), such as TI2V-5B, which the family wan_ti2v trains"
        )


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"spec.model.source {what}; the family wan trains text-to-video and image-to-video checkpoints of Wan 2.1 and Wan 2.2 A14B: "
        "set spec.model.source to one of those"
    )


FAMILY = Wan()
