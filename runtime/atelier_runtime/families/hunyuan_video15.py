"""HunyuanVideo 1.5, text to video: flow matching on clips, two streams that attend to each other.

Latents are [B, 32, (F - 1)/4 + 1, H/16, W/16], scaled; clips have 4n + 1 frames. The denoiser is given 65 channels: the noisy latents,
and 32 of a frame to begin with and its mask, which are zero for text to video, as is the picture of SigLIP. Captions go through the
language model of Qwen2.5-VL in a chat turn, of which the third-last hidden state is kept without the system message; the words in
quotation marks, to be drawn as letters, through ByT5 as well. Sources: diffusers
`pipelines/hunyuan_video1_5/pipeline_hunyuan_video1_5.py`, `models/transformers/transformer_hunyuan_video15.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import (
    Blocks,
    Conditions,
    Family,
    Features,
    Latents,
    SampleRequest,
    TimeEmbedder,
    configuration,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
LAST_BLOCK = ("attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
"""Layers that only the caption's stream needs, which ends unread."""


class HunyuanVideo15(Family):
    """HunyuanVideo 1.5 T2V. Checkpoints that are given a picture, and those that sharpen a clip, are refused."""

    name = "hunyuan_video15"
    pipeline = "HunyuanVideo15Pipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (
        Blocks("context_embedder.token_refiner.refiner_blocks", "text"),
        Blocks("transformer_blocks", "tokens,text"),
    )
    # The refiner of the captions has one of its own, which is told where a step starts and no more.
    time_embedder = TimeEmbedder("time_embed.timestep_embedder", "time_embed.time_proj", scale=1000)
    frozen_parameters = (r"image_embedder\..*",)

    def dead_modules(self, denoiser: nn.Module) -> tuple[str, ...]:
        last = configuration(denoiser).num_layers - 1
        return tuple(f"transformer_blocks.{last}.{layer}" for layer in LAST_BLOCK)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 3584], at most 1000, and `embeds_2` [M, 1472] of the words in quotation marks, at most 256; without such
        words M is 0. `mask` [L] and `mask_2` [M] are all true: after padding in a batch they tell the true lengths.
        """
        encoded = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, batch_size=len(prompts))
        features = []
        for embeds, mask, glyphs, glyph_mask in zip(*encoded, strict=True):
            kept, kept_2 = mask.bool(), glyph_mask.bool()
            features.append(
                {
                    "embeds": embeds[kept],
                    "mask": kept[kept],
                    "embeds_2": glyphs[kept_2],
                    "mask_2": kept_2[kept_2],
                }
            )
        return features

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, F, H, W] pixels in [-1, 1]; one clip at a time, since the autoencoder's attention can take no more."""
        clips = [pipe.vae.encode(clip).latent_dist for clip in pixels.to(pipe.vae.dtype).unsqueeze(1).unbind()]
        mean, std = (torch.cat([getattr(clip, name) for clip in clips]) for name in ("mean", "std"))
        scale = pipe.vae.config.scaling_factor
        return Latents(mean=mean * scale, std=std * scale)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 32, F, H, W]. Raises ConfigError for a denoiser of another task.

        A call for each sample, without padding: that would only make attention's mask larger, which is a square of all tokens, and
        leave whole rows of it false. Under sharding all ranks must call equally often, whatever the lengths.
        """
        config = configuration(denoiser)
        channels = noisy.shape[1]
        if config.use_meanflow or config.in_channels != 2 * channels + 1:
            raise ConfigError(
                f"spec.model.source has a denoiser of {config.in_channels} input channels with use_meanflow {config.use_meanflow}, "
                f"such as sharpens clips; the family hunyuan_video15 trains text to video, {2 * channels + 1} channels with one time: "
                "set spec.model.source to a checkpoint of that"
            )
        hidden = torch.cat([noisy, torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])], dim=1)
        text = conditions.text
        # The first layer of these is a norm, which takes no input of more precision than its weights.
        model: Any = getattr(denoiser, "module", denoiser)
        norm = model.context_embedder_2.norm.weight.dtype
        lengths = zip(text["mask"].sum(dim=1).tolist(), text["mask_2"].sum(dim=1).tolist(), strict=True)
        outputs = []
        for one, (length, length_2) in enumerate(lengths):
            sample = slice(one, one + 1)
            outputs.append(
                denoiser(
                    hidden_states=hidden[sample],
                    timestep=time[sample] * 1000,
                    encoder_hidden_states=text["embeds"][sample, :length],
                    encoder_attention_mask=text["mask"][sample, :length],
                    encoder_hidden_states_2=text["embeds_2"][sample, :length_2].to(norm),
                    encoder_attention_mask_2=text["mask_2"][sample, :length_2],
                    # The pipeline's 729 zeros are masked; none of them says the same.
                    image_embeds=noisy.new_zeros(1, 0, config.image_embed_dim, dtype=norm),
                    return_dict=False,
                )[0]
            )
        return torch.cat(outputs)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Guidance is no argument of the pipeline but a number of its guider, which is set here.

        Raises ConfigError for a negative prompt that would do nothing: a checkpoint need not be of the flavour that the run names.
        """
        arguments = super().sampling_arguments(pipe, request)
        guidance = arguments.pop("guidance_scale", pipe.guider.config.guidance_scale)
        if request.negative and guidance == 1:
            raise ConfigError(
                f"spec.validation.prompts has the negative prompt {request.negative!r}; it does something only with guidance above 1, "
                "which this checkpoint does not ask for by itself: set spec.validation.guidance, or remove it"
            )
        pipe.guider.guidance_scale = guidance
        return arguments


FAMILY = HunyuanVideo15()
