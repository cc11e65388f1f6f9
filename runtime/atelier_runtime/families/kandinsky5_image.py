"""Kandinsky 5.0 Image, text to image: flow matching with cross-attention to a caption of its own, variable length.

Latents [B, 16, H/8, W/8] of Flux's autoencoder, scaled but not shifted, enter channels last as a clip of one frame. Time is 0..1000
at the network's door. Text: Qwen2.5-VL after a template whose first 40 tokens are dropped, and CLIP's pooled vector. The network
takes no mask, so each sample of a batch runs alone at its true length. Source: diffusers' `pipeline_kandinsky_t2i.py` and
`transformer_kandinsky.py`.
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

ATTENTION = ("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer")
MLP = ("feed_forward.in_layer", "feed_forward.out_layer")


class Kandinsky5Image(Family):
    """Kandinsky 5.0 T2I Lite. A denoiser with channels for a picture to edit is refused."""

    name = "kandinsky5_image"
    pipeline = "Kandinsky5T2IPipeline"
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

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, H, W] pixels in [-1, 1]. The pipeline leaves the autoencoder's `shift_factor` out, and so do we."""
        posterior = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist
        scale = pipe.vae.config.scaling_factor
        return Latents(mean=posterior.mean * scale, std=posterior.std * scale)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, H, W]. Raises ConfigError for a denoiser that takes a picture beside the noise.

        As many calls as samples whatever their lengths, since under sharding all ranks must call equally often.
        """
        config = configuration(denoiser)
        if config.visual_cond:
            raise ConfigError(
                "spec.model.source has a denoiser that takes a picture beside the noise (visual_cond); the family kandinsky5_image "
                "trains text to image: set spec.model.source to a T2I checkpoint"
            )
        rows, columns = noisy.shape[-2] // config.patch_size[1], noisy.shape[-1] // config.patch_size[2]
        hidden = noisy.movedim(1, -1).unsqueeze(1).contiguous()
        positions = [torch.arange(length, device=noisy.device) for length in (1, rows, columns)]
        text = conditions.text
        outputs = [
            denoiser(
                hidden_states=hidden[one : one + 1],
                encoder_hidden_states=text["embeds"][one : one + 1, :length],
                timestep=time[one : one + 1] * 1000,
                pooled_projections=text["pooled"][one : one + 1],
                visual_rope_pos=positions,
                text_rope_pos=torch.arange(length, device=noisy.device),
                return_dict=False,
            )
            for one, length in enumerate(text["mask"].sum(dim=1).tolist())
        ]
        return torch.cat(outputs).squeeze(1).movedim(-1, 1)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Adds the size to those that `pipe` draws: it would take the nearest of its seven for any other, and only warn."""
        size = (request.width, request.height)
        if size not in pipe.resolutions:
            pipe.resolutions = [*pipe.resolutions, size]
        return super().sampling_arguments(pipe, request)


FAMILY = Kandinsky5Image()
