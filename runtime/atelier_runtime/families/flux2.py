"""Flux.2: a flow transformer, first with two streams and then with one, whose modulation all blocks share.

Latents are 2 x 2 patches of the autoencoder's, normalised by the running statistics of its batch norm: [B, 128, H/16, W/16], each
pixel a token; time is sigma itself. Text: hidden states of three layers of one language model, side by side, padded to 512 tokens of
which no mask hides any, so the length is part of the model. `dev` reads Mistral and embeds its guidance, `klein` reads Qwen3 and
contrasts with a second prediction. Source: diffusers' `pipeline_flux2.py`, `pipeline_flux2_klein.py` and `transformer_flux2.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
from atelier_runtime.lora_layout import ADDED_QUERY_KEY_VALUE, QUERY_KEY_VALUE, THIRDS, LoraLayout, fused, plain

TRAINING_GUIDANCE = 1.0
"""A distilled checkpoint is trained as if it were asked for no guidance: the data holds none."""
# Single blocks have one layer into attention and feed-forward and one out of both: they count as attention.
SINGLE = ("to_qkv_mlp_proj", "attn.to_out")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
LAYOUT = LoraLayout(
    architecture="Flux.2-dev",
    flat=True,
    rules=(
        *fused(_DOUBLE + r"attn\.", QUERY_KEY_VALUE, r"double_blocks.\1.img_attn.qkv", THIRDS),
        *fused(_DOUBLE + r"attn\.", ADDED_QUERY_KEY_VALUE, r"double_blocks.\1.txt_attn.qkv", THIRDS),
        *plain(
            _DOUBLE,
            r"double_blocks.\1.",
            {
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.linear_in": "img_mlp.0",
                "ff.linear_out": "img_mlp.2",
                "ff_context.linear_in": "txt_mlp.0",
                "ff_context.linear_out": "txt_mlp.2",
            },
        ),
        *plain(_SINGLE, r"single_blocks.\1.", {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
    ),
)
"""Query, key and value of a double block are one layer in the original repository. The stock pipeline's `load_lora_weights` reads
it."""


class Flux2(Family):
    """Flux.2 dev and Flux.2 klein, text to image."""

    name = "flux2"
    pipeline = "Flux2Pipeline"
    lora_targets = {  # noqa: RUF012
        "attention": ATTENTION + SINGLE,
        "mlp": MLP,
        "all": ATTENTION + MLP + SINGLE,
    }
    lora_layout = LAYOUT
    blocks = (Blocks("transformer_blocks", "text,tokens"), Blocks("single_transformer_blocks", "text|tokens"))
    time_embedder = TimeEmbedder("time_guidance_embed.timestep_embedder", "time_guidance_embed.time_proj", scale=1000)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [512, 3 x the encoder's width]."""
        embeds, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device)
        return [{"embeds": one} for one in embeds]

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents [B, 128, H/16, W/16] of [B, 3, H, W] pixels in [-1, 1]: the posterior's mode, patched, then normalised."""
        vae = pipe.vae
        patches = F.pixel_unshuffle(vae.encode(pixels.to(vae.dtype)).latent_dist.mode(), 2)
        mean, variance = (
            tensor.view(1, -1, 1, 1).to(patches.dtype) for tensor in (vae.bn.running_mean, vae.bn.running_var)
        )
        return Latents(mean=(patches - mean) / torch.sqrt(variance + vae.config.batch_norm_eps))

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 128, H/16, W/16]."""
        embeds = conditions.text["embeds"]
        grid = noisy.shape[-2:]
        guidance = None
        if configuration(denoiser).guidance_embeds:
            value = TRAINING_GUIDANCE if conditions.guidance is None else conditions.guidance
            guidance = torch.full_like(time, value)
        tokens = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=time,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=_positions((1, 1, 1, embeds.shape[1]), noisy),
            img_ids=_positions((1, *grid, 1), noisy),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, grid)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Neither pipeline takes a negative prompt as text; that of klein takes its embeddings, in place of the empty prompt's.

        Raises ConfigError for a negative prompt that would do nothing.
        """
        arguments = super().sampling_arguments(pipe, request)
        negative = arguments.pop("negative_prompt", "")
        if not negative:
            return arguments
        distilled = pipe.transformer.config.guidance_embeds or pipe.config.get("is_distilled")
        if distilled or arguments.get("guidance_scale", 2.0) <= 1:
            way = "remove it" if distilled else "set spec.validation.guidance above 1"
            kind = "is distilled" if distilled else "is sampled without guidance"
            raise ConfigError(
                f"spec.validation.prompts has the negative prompt {negative!r}; the checkpoint {kind}: {way}"
            )
        return arguments | {"negative_prompt_embeds": pipe.encode_prompt(negative)[0]}


def _positions(lengths: Sequence[int], like: Tensor) -> Tensor:
    """[1, tokens, 4]: (picture, row, column, place in the text) of every token; diffusers takes those of the first sample for all."""
    return torch.cartesian_prod(*(torch.arange(length, device=like.device) for length in lengths)).unsqueeze(0)


FAMILY = Flux2()
