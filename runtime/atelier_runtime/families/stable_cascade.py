"""Stable Cascade, stage C: a UNet of one resolution that predicts epsilon on a cosine of a continuous time (arXiv:2306.00637).

Latents [B, 16, H/42.67, W/42.67] of an EfficientNet, which is shown the picture at three quarters of its size and makes one latent of
32 pixels; edges are multiples of 128, where all of this is whole. Text: the last hidden states of CLIP bigG, padded to 77 tokens
without a mask, so the length is part of the model, and its pooled vector. A picture as condition is zeros, as in the pipeline without
one. Stage B, which decodes, is not trained. Source: diffusers' `pipeline_stable_cascade_prior.py` and `unet_stable_cascade.py`.

The checkpoint folder is put together as docs/models/stable-cascade.md says: no published one has the encoder. A LoRA is loaded by the
loader that diffusers has for other denoisers, as with PixArt Sigma.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, Latents, configuration

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("channelwise.0", "channelwise.4")


class StableCascade(Family):
    """Stable Cascade's prior, 3.6B and lite."""

    name = "stable_cascade"
    pipeline = "StableCascadePipeline"
    denoisers = ("prior",)
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = tuple(
        Blocks(f"{half}_blocks.{level}", "maps", inner="SDCascadeAttnBlock")
        for half in ("down", "up")
        for level in (0, 1)
    )
    frozen_parameters = (r"clip_img_mapper\.weight",)  # its input is zeros

    def pipeline_of(self, pipeline_config: Mapping[str, Any]) -> str:
        """Ours, also for the published folder of stage C to which the encoder was added."""
        return self.pipeline

    def check_sampling(self, pipeline_config: Mapping[str, Any]) -> None:
        lacking = [name for name in ("decoder", "vqgan") if (pipeline_config.get(name) or (None, None))[1] is None]
        if lacking:
            raise ConfigError(
                f"spec.validation.prompts are to be drawn, and the checkpoint of spec.model.source has no {' and no '.join(lacking)}, "
                "which make a picture of what stage C draws; add both as docs/models/stable-cascade.md says, or remove the prompts"
            )

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [77, 1280] and `pooled` [1, 1280]."""
        embeds, pooled, _, _ = pipe.encode_prompt(
            pipe.text_encoder.device, len(prompts), 1, False, prompt=list(prompts)
        )
        return [{"embeds": one, "pooled": vector} for one, vector in zip(embeds, pooled, strict=True)]

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents [B, 16, 3H/128, 3W/128] of [B, 3, H, W] pixels in [-1, 1], normalised by the encoder itself."""
        size = [3 * side // 4 for side in pixels.shape[-2:]]
        shown = functional.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True) / 2 + 0.5
        mean, std = (shown.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return Latents(mean=pipe.effnet(((shown - mean) / std).to(pipe.effnet.dtype)))

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Epsilon, [B, 16, 3H/128, 3W/128]."""
        return denoiser(
            noisy,
            timestep_ratio=time,
            clip_text_pooled=conditions.text["pooled"],
            clip_text=conditions.text["embeds"],
            clip_img=noisy.new_zeros(len(noisy), 1, configuration(denoiser).clip_image_in_channels),
            return_dict=False,
        )[0]


FAMILY = StableCascade()
