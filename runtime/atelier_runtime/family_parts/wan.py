"""What the families of Wan networks share: text, latents of clips, layers and their names.

Latents are the posterior's mode, normalised per channel; clips have 4n + 1 frames. The text encoder is UMT5, 512 tokens with zeros
after the true length, all of which take part in attention. Source: diffusers `pipelines/wan/pipeline_wan.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Family, Features, Latents
from atelier_runtime.family_parts.channels import standardised
from atelier_runtime.lora_layout import LoraLayout, plain

TEXT_TOKENS = 512  # what the pipeline pads to when it samples; `encode_prompt` alone would take 226
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ffn.net.0.proj", "ffn.net.2")

_ATTENTION_NAMES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
LAYOUT = LoraLayout(
    architecture="wan",
    flat=False,
    rules=(
        *plain(r"blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn.", _ATTENTION_NAMES),
        *plain(r"blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn.", _ATTENTION_NAMES),
        *plain(r"blocks\.(\d+)\.ffn\.", r"blocks.\1.ffn.", {"net.0.proj": "0", "net.2": "2"}),
    ),
)
"""The stock pipeline's `load_lora_weights` reads it, the second expert with `load_into_transformer_2=True`."""


class WanNetwork(Family):
    """A family whose denoiser is a `WanTransformer3DModel`."""

    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("blocks"),)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, D] without the zeros after the true length; `collate_text` puts them back."""
        embeds, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=pipe.text_encoder.device,
        )
        lengths = [int(row.any(dim=-1).nonzero().max()) + 1 for row in embeds]
        return [{"embeds": row[:length].clone()} for row, length in zip(embeds, lengths, strict=True)]

    def collate_text(self, samples: Sequence[Features]) -> Features:
        """`embeds` [B, 512, D], zeros after each sample's length: the network attends to them when sampling, too."""
        rows = [sample["embeds"] for sample in samples]
        return {"embeds": torch.stack([functional.pad(row, (0, 0, 0, TEXT_TOKENS - len(row))) for row in rows])}

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, F, H, W] pixels in [-1, 1]."""
        mode = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
        return Latents(mean=standardised(pipe.vae, mode))


def require_a_clip(pixels: Tensor) -> None:
    """Raise ConfigError where the frames that are shown, of pixels [B, 3, F, H, W], would be all there is."""
    if pixels.shape[2] < 5:
        raise ConfigError(
            f"spec.data.clip.frames is {pixels.shape[2]}, and an image-to-video checkpoint is shown frames of the clip to draw the "
            "rest; it must be 5 or more"
        )
