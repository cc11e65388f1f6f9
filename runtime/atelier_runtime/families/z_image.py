"""Z-Image: flow matching on pictures, one stream of picture and text tokens.

The network wants lists of single samples, time reversed (1 - sigma, 0 is noise) and predicts clean - noise; all three are hidden
here. Latents are those of the Flux autoencoder, [B, 16, H/8, W/8], patches of 2. The text encoder is a causal language model that
is given a chat turn with thinking switched on; its second-last hidden state is used, without padding.
Source: diffusers `pipelines/z_image/pipeline_z_image.py`, `models/transformers/transformer_z_image.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Features, TimeEmbedder
from atelier_runtime.lora_layout import LoraLayout, Rule

ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

LAYOUT = LoraLayout(
    architecture="z-image",
    flat=False,
    rules=(
        Rule(
            r"(?:layers|context_refiner|noise_refiner)\.\d+\."
            r"(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)",
            r"\g<0>",
        ),
    ),
)
"""The stock pipeline's `load_lora_weights` reads it."""


class ZImage(Family):
    """Z-Image and Z-Image Turbo, text to image."""

    name = "z_image"
    pipeline = "ZImagePipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    # The refiners see one modality alone: `noise_refiner` the picture's tokens, `context_refiner` the text's.
    blocks = (Blocks("noise_refiner"), Blocks("context_refiner", "text"), Blocks("layers", "tokens|text"))
    time_embedder = TimeEmbedder("t_embedder", scale_field="t_scale", reversed=True)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, D] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        # A copy, since the pipeline writes the chat turns into the list it is given.
        embeds, _ = pipe.encode_prompt(
            list(prompts), device=pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return [
            {"embeds": item, "mask": torch.ones(len(item), dtype=torch.bool, device=item.device)} for item in embeds
        ]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, C, H, W]."""
        lengths = conditions.text["mask"].sum(dim=1).tolist()
        embeds = [
            item[:length] for item, length in zip(conditions.text["embeds"].to(noisy.dtype), lengths, strict=True)
        ]
        output = denoiser(list(noisy.unsqueeze(2).unbind(0)), 1 - time, embeds, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)


FAMILY = ZImage()
