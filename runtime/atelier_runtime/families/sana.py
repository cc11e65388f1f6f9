"""Sana: a flow transformer with linear attention over the picture's tokens and cross-attention to the text (arXiv:2410.10629).

Latents [B, 32, H/32, W/32] of an autoencoder without a posterior, each pixel a token. Time 0..1000 at the network's door, times the
checkpoint's `timestep_scale`. Text: the last hidden state of Gemma 2, at most 300 tokens, of which the mask hides the padding. A
caption follows a long instruction, of which only the first and the last token are kept; the empty caption stands alone, as the
pipeline has it for its negative prompt. Source: diffusers' `pipeline_sana.py` and `sana_transformer.py`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

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

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ff.conv_inverted", "ff.conv_point")  # without the depth-wise convolution between them


class Sana(Family):
    name = "sana"
    pipeline = "SanaPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("transformer_blocks"),)
    time_embedder = TimeEmbedder(
        "time_embed.emb.timestep_embedder", "time_embed.emb.time_proj", scale=1000, scale_field="timestep_scale"
    )

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 2304] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        return [_features(pipe, prompt) for prompt in prompts]

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, H, W] pixels in [-1, 1]."""
        latent = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent
        return Latents(mean=latent * pipe.vae.config.scaling_factor)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, C, H, W]."""
        return denoiser(
            noisy,
            encoder_hidden_states=conditions.text["embeds"].to(noisy.dtype),
            encoder_attention_mask=conditions.text["mask"],
            timestep=time * 1000 * configuration(denoiser).timestep_scale,
            return_dict=False,
        )[0]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Without the pipeline's bins, which would draw another size than was asked for and scale the picture."""
        return super().sampling_arguments(pipe, request) | {"use_resolution_binning": False}


def _features(pipe: Any, prompt: str) -> Features:
    # The instruction stands nowhere but in the signature of the pipeline's call; `encode_prompt` alone would leave it out.
    instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    embeds, mask, _, _ = pipe.encode_prompt(
        prompt, do_classifier_free_guidance=False, complex_human_instruction=instruction if prompt else None
    )
    length = int(mask.sum())
    return {"embeds": embeds[0, :length].clone(), "mask": mask[0, :length].bool()}


FAMILY = Sana()
