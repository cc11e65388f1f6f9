"""What the families around diffusers' `QwenImageTransformer2DModel` share: latents, layers and their names, the call, guidance.

Latents [B, 16, H/8, W/8] of an autoencoder of clips, the posterior's mode, normalised per channel, enter as 2 x 2 patches,
[B, HW/256, 64]; time is sigma itself. A mask hides the padding of text. Reference pictures enter as clean tokens behind the noisy
ones; a checkpoint with `zero_cond_t` gives them time 0 by itself, else they share the target's. Source: diffusers'
`pipeline_qwenimage.py`, `pipeline_qwenimage_edit.py` and `transformer_qwenimage.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Latents, SampleRequest
from atelier_runtime.family_parts.channels import standardised
from atelier_runtime.family_parts.packing import packed
from atelier_runtime.lora_layout import LoraLayout, Rule

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

LAYOUT = LoraLayout(
    architecture="qwen-image",
    flat=True,
    rules=(
        Rule(
            r"transformer_blocks\.\d+\."
            r"(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(?:img|txt)_mlp\.net\.(?:0\.proj|2)|(?:img|txt)_mod\.1)",
            r"\g<0>",
        ),
    ),
)
"""The names are diffusers' own. The stock pipelines' `load_lora_weights` reads it."""


class QwenImageNetwork(Family):
    """Everything but text, and what pictures are edited."""

    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("transformer_blocks", "text,tokens"),)

    def dead_modules(self, denoiser: nn.Module) -> tuple[str, ...]:
        """The last block drops its text stream: what its queries have gathered, and all that is made of it."""
        last = len(denoiser.get_submodule("transformer_blocks")) - 1  # type: ignore[arg-type]
        names = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return tuple(f"transformer_blocks.{last}.{name}" for name in names)

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents of [B, 3, H, W] pixels in [-1, 1], each a clip of one frame to the autoencoder."""
        mode = pipe.vae.encode(pixels.unsqueeze(2).to(pipe.vae.dtype)).latent_dist.mode().squeeze(2)
        return Latents(mean=standardised(pipe.vae, mode))

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean of the noisy tokens, [B, 16, H, W]; what comes out behind them, in the references' place, is cut off."""
        mask = conditions.text["mask"]
        pictures = (noisy, *conditions.references)
        grids = [(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in pictures]
        _, rows, columns = grids[0]
        tokens = denoiser(
            hidden_states=torch.cat([packed(each) for each in pictures], dim=1),
            encoder_hidden_states=conditions.text["embeds"],
            # Without a mask attention has faster kernels, so the pipeline gives none where nothing is padded.
            encoder_hidden_states_mask=None if mask.all() else mask,
            timestep=time,
            img_shapes=[grids] * len(noisy),
            return_dict=False,
            **conditions.controlled,
        )[0][:, : rows * columns]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Guidance is a contrast with a negative prompt, which the pipeline leaves out where there is none, be it empty."""
        arguments = super().sampling_arguments(pipe, request)
        if "guidance_scale" in arguments:
            guided = {"true_cfg_scale": arguments.pop("guidance_scale"), "negative_prompt": request.negative or ""}
            arguments |= guided
        return arguments
