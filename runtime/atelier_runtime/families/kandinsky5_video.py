"""Kandinsky 5.0 Video, text to video: flow matching with cross-attention to a caption of its own, variable length.

Latents [B, 16, (F - 1)/4 + 1, H/8, W/8] enter channels last, in T2V checkpoints beside as many zeros and a zero mask, where I2V
has its first frame. Time is 0..1000 at the network's door. Text: Qwen2.5-VL after a template whose first 128 tokens are dropped, and
CLIP's pooled vector. The network takes no mask, so each sample of a batch runs alone at its true length. Source: diffusers'
`pipeline_kandinsky.py` and `transformer_kandinsky.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, TimeEmbedder, configuration

ATTENTION = ("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer")
MLP = ("feed_forward.in_layer", "feed_forward.out_layer")
PIXELS = 8  # side of a latent pixel of the published autoencoder
MEDIUM = range(480, 855)  # sides, in pixels, that the pipeline takes for the resolution of the Lite checkpoints


class Kandinsky5Video(Family):
    """Kandinsky 5.0 T2V Lite and Pro of 5 seconds. Checkpoints with sparse attention, those of 10 seconds, are refused."""

    name = "kandinsky5_video"
    pipeline = "Kandinsky5T2VPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("text_transformer_blocks", "text"), Blocks("visual_transformer_blocks"))
    time_embedder = TimeEmbedder("time_embeddings", scale=1000)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 3584], `pooled` [768], and `mask` [L], all true: after padding in a batch it tells the true length.

        One prompt at a time, as the encoder sees no mask either.
        """
        features = []
        for prompt in prompts:
            embeds, pooled, _ = pipe.encode_prompt([prompt], device=pipe.text_encoder.device)
            mask = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
            features.append({"embeds": embeds[0], "pooled": pooled[0], "mask": mask})
        return features

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, F, H, W]. Raises ConfigError for a denoiser with sparse attention.

        As many calls as samples whatever their lengths, since under sharding all ranks must call equally often.
        """
        config = configuration(denoiser)
        if config.attention_type != "regular":
            raise ConfigError(
                f"spec.model.source has a denoiser with {config.attention_type} attention, as the checkpoints of 10 seconds have; "
                "the family kandinsky5_video trains regular attention: set spec.model.source to a checkpoint of 5 seconds"
            )
        frames, height, width = noisy.shape[2:]
        patch = config.patch_size
        hidden = noisy.movedim(1, -1)
        if config.visual_cond:
            hidden = torch.cat([hidden, torch.zeros_like(hidden), torch.zeros_like(hidden[..., :1])], dim=-1)
        positions = [
            torch.arange(length // side, device=noisy.device)
            for length, side in zip((frames, height, width), patch, strict=True)
        ]
        text = conditions.text
        outputs = [
            denoiser(
                hidden_states=hidden[one : one + 1].contiguous(),
                encoder_hidden_states=text["embeds"][one : one + 1, :length],
                timestep=time[one : one + 1] * 1000,
                pooled_projections=text["pooled"][one : one + 1],
                visual_rope_pos=positions,
                text_rope_pos=torch.arange(length, device=noisy.device),
                scale_factor=_rope_scale(height * PIXELS, width * PIXELS),
                return_dict=False,
            )
            for one, length in enumerate(text["mask"].sum(dim=1).tolist())
        ]
        return torch.cat(outputs).movedim(-1, 1)


def _rope_scale(height: int, width: int) -> tuple[float, float, float]:
    """What positions in frame, row and column are divided by, for sides in pixels."""
    return (1, 2, 2) if height in MEDIUM and width in MEDIUM else (1, 3.16, 3.16)


FAMILY = Kandinsky5Video()
