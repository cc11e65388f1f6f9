"""Wan 2.1 and 2.2, text to video: flow matching on clips.

Latents are [B, 16, (F - 1)/4 + 1, H/8, W/8], the posterior's mode, normalised per channel; clips have 4n + 1 frames. The text
encoder is UMT5, 512 tokens with zeros after the true length, all of which take part in attention. Wan 2.2 has two experts:
`transformer` for high noise, sigma in [boundary, 1], and `transformer_2` for low noise; the boundary stands in
`model_index.json`. Source: diffusers `pipelines/wan/pipeline_wan.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, Latents, Stage, configuration
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


class Wan(Family):
    """Wan 2.1 T2V and Wan 2.2 T2V-A14B. Image-conditioned checkpoints and TI2V-5B are refused."""

    name = "wan"
    pipeline = "WanPipeline"
    denoisers = ("transformer", "transformer_2")
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("blocks"),)

    def stages(self, pipeline_config: Mapping[str, Any], denoisers: Sequence[str]) -> tuple[Stage, ...]:
        """One stage over (0, 1], or the two experts' ranges. Raises ConfigError for TI2V-5B and for experts without a boundary."""
        if pipeline_config.get("expand_timesteps"):
            raise _refused("is a checkpoint with a time per token (expand_timesteps), such as TI2V-5B")
        boundary = pipeline_config.get("boundary_ratio")
        if boundary is None:
            if len(denoisers) > 1:
                raise _refused(f"has the experts {', '.join(denoisers)} but no boundary_ratio in model_index.json")
            return (Stage(denoisers[0]),)
        ranges = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
        return tuple(Stage(name, *ranges[name]) for name in denoisers)

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
        mean, std = (
            torch.tensor(values, device=mode.device, dtype=mode.dtype).view(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        return Latents(mean=(mode - mean) / std)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, C, F, H, W]. Raises ConfigError where the network wants conditioning channels beside the noise."""
        channels = configuration(denoiser).in_channels
        if channels != noisy.shape[1]:
            raise _refused(f"has a denoiser of {channels} input channels where the latents have {noisy.shape[1]}")
        embeds = conditions.text["embeds"].to(noisy.dtype)
        return denoiser(noisy, time * 1000, embeds, return_dict=False)[0]


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"spec.model.source {what}; the family wan trains text-to-video checkpoints of Wan 2.1 and Wan 2.2 A14B: "
        "set spec.model.source to one of those"
    )


FAMILY = Wan()
