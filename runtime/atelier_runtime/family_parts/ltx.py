"""What the families of LTX Video 0.9.0 and 0.9.1 share: text, latents of clips, layers and their names, and the call of the network.

Latents [B, 128, (F - 1)/8 + 1, H/32, W/32], normalised per channel by buffers of the autoencoder; every latent pixel is a token. Time
is 0..1000 at the network's door, and positions are seconds and pixels, so the frame rate is a condition. Text: T5, 128 tokens encoded
with their padding, which a mask then keeps out of cross-attention. Source: diffusers' `pipeline_ltx.py` and `transformer_ltx.py`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Features, Latents
from atelier_runtime.lora_layout import LoraLayout, Rule

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ff.net.0.proj", "ff.net.2")
TEMPORAL_FACTOR, SPATIAL_FACTOR = 8, 32  # of the autoencoder: they turn latent positions into frames and pixels
FRAME_RATE = 25.0  # default of the pipeline

LAYOUT = LoraLayout(
    architecture="ltx-video",
    flat=False,
    rules=(
        Rule(
            r"transformer_blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2))",
            r"\g<0>",
        ),
    ),
)
"""The names are diffusers' own. The stock pipeline cannot read the file: it knows no `alpha` of LTX, and says so."""


class LTXNetwork(Family):
    """A family whose denoiser is an `LTXVideoTransformer3DModel`."""

    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("transformer_blocks"),)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 4096] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        embeds, mask, _, _ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=pipe.text_encoder.device
        )
        return [{"embeds": row[kept], "mask": kept[kept]} for row, kept in zip(embeds, mask, strict=True)]

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, F, H, W] pixels in [-1, 1]. The mean and deviation of the channels are weights, not settings."""
        posterior = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist
        mean, std = (
            values.to(posterior.mean).view(1, -1, 1, 1, 1) for values in (pipe.vae.latents_mean, pipe.vae.latents_std)
        )
        scale = pipe.vae.config.scaling_factor / std
        return Latents(mean=(posterior.mean - mean) * scale, std=posterior.std * scale)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 128, F, H, W]; `time` is [B], or [B, F * H * W] with one for each token."""
        frames, height, width = noisy.shape[2:]
        tokens = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=conditions.text["embeds"],
            timestep=time * 1000,
            encoder_attention_mask=conditions.text["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(
                TEMPORAL_FACTOR / (conditions.frame_rate or FRAME_RATE),
                SPATIAL_FACTOR,
                SPATIAL_FACTOR,
            ),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (frames, height, width))
