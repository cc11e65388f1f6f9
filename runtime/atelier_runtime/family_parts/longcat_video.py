"""What the families of LongCat-Video's network share: text, latents of clips, layers, and the prediction from text alone.

Latents are [B, 16, (F - 1)/4 + 1, H/8, W/8], the posterior's mode, normalised per channel; clips have 4n + 1 frames. Time is
0..1000 at the network's door, and its output, clean - noise, is negated. Text: UMT5, 512 tokens and their mask, on which the network
sets padding to zero and attends to it. Source: `atelier_runtime/networks/longcat_video_pipeline.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_runtime.family import Blocks, Conditions, Family, Features, Latents, TimeEmbedder
from atelier_runtime.family_parts.channels import standardised

TEXT_TOKENS = 512
ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
MLP = ("ffn.w1", "ffn.w2", "ffn.w3")


class LongCatVideoNetwork(Family):
    """A family whose denoiser is a `LongCatVideoTransformer3DModel`; dense attention whatever the size."""

    pipeline = "LongCatVideoPipeline"
    denoisers = ("dit",)
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("blocks"),)
    time_embedder = TimeEmbedder("t_embedder", scale=1000, rows="parts")

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 4096] and `mask` [L], all true, without padding: its features never reach the denoiser."""
        embeds, mask = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device)
        return [
            {"embeds": row[real].clone(), "mask": real[real]} for row, real in zip(embeds, mask.bool(), strict=True)
        ]

    def collate_text(self, samples: Sequence[Features]) -> Features:
        """`embeds` [B, 512, 4096] and `mask` [B, 512]: the network attends to its zeros, so their number counts."""
        missing = [TEXT_TOKENS - len(sample["mask"]) for sample in samples]
        embeds = [functional.pad(s["embeds"], (0, 0, 0, count)) for s, count in zip(samples, missing, strict=True)]
        masks = [functional.pad(s["mask"], (0, count)) for s, count in zip(samples, missing, strict=True)]
        return {"embeds": torch.stack(embeds), "mask": torch.stack(masks)}

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, F, H, W] pixels in [-1, 1]."""
        mode = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
        return Latents(mean=standardised(pipe.vae, mode))

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, F, H, W], with one time for all frames."""
        text = conditions.text
        return -denoiser(noisy, time * 1000, text["embeds"], text["mask"], return_dict=False)[0]
