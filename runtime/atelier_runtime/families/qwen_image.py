"""Qwen-Image: a flow transformer of two streams, with true classifier-free guidance (arXiv:2508.02324).

Text: Qwen2.5-VL after a template whose first 34 tokens are dropped, at most 512 tokens, of which a mask hides the padding. Source:
diffusers' `pipeline_qwenimage.py`; all else is in `atelier_runtime.family_parts.qwen_image`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_runtime.control import Control, copied_blocks, with_plain_config
from atelier_runtime.family import Features, Latents, SampleRequest, TimeEmbedder
from atelier_runtime.family_parts.channels import standardised, statistics
from atelier_runtime.family_parts.packing import packed
from atelier_runtime.family_parts.qwen_image import QwenImageNetwork

TEXT_TOKENS = 512  # what the pipeline keeps when it samples; `encode_prompt` alone would keep 1024
CONTROL_BLOCKS = 5  # diffusers' default
TEXT_STREAM = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
"""What only a block's text stream comes out of."""


class QwenImageControl(Control):
    """The first blocks; what comes out of one is added behind several of the base's.

    Source: diffusers' `controlnet_qwenimage.py`, `pipeline_qwenimage_controlnet.py` and `transformer_qwenimage.py`.
    """

    pipeline = "QwenImageControlNetPipeline"
    network = "QwenImageControlNetModel"
    picture = "control_image"
    takes = "latents"

    def copied(self, base: Any) -> nn.Module:
        from diffusers import QwenImageControlNetModel

        config = base.config
        network = QwenImageControlNetModel.from_transformer(
            with_plain_config(base),
            num_layers=copied_blocks(config.num_layers, CONTROL_BLOCKS),
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
        )
        network.txt_norm.load_state_dict(base.txt_norm.state_dict())  # which that function leaves out
        return network

    def unused(self, network: Any) -> tuple[str, ...]:
        last = len(network.transformer_blocks) - 1
        return tuple(f"transformer_blocks.{last}.{name}" for name in TEXT_STREAM)

    def predict(
        self, base: nn.Module, network: nn.Module, condition: Tensor, scale: float, *given: Any, **named: Any
    ) -> Any:
        samples = network(*given, controlnet_cond=packed(condition), conditioning_scale=scale, **named)
        return base(*given, controlnet_block_samples=samples, **named)


class QwenImage(QwenImageNetwork):
    name = "qwen_image"
    pipeline = "QwenImagePipeline"
    time_embedder = TimeEmbedder("time_text_embed.timestep_embedder", "time_text_embed.time_proj")
    control = QwenImageControl()

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 3584] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        embeds, mask = pipe.encode_prompt(list(prompts), max_sequence_length=TEXT_TOKENS)
        if mask is None:  # all of the same length
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return [{"embeds": row[kept], "mask": kept[kept]} for row, kept in zip(embeds, mask.bool(), strict=True)]

    def encode_condition(self, pipe: Any, pixels: Tensor) -> Latents:
        """The whole posterior, of whose mode a sample is made: the pipeline draws those of the conditioning picture."""
        posterior = pipe.vae.encode(pixels.unsqueeze(2).to(pipe.vae.dtype)).latent_dist
        _, deviation = statistics(pipe.vae, posterior.std)
        return Latents(standardised(pipe.vae, posterior.mean).squeeze(2), (posterior.std / deviation).squeeze(2))

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        return super().sampling_arguments(pipe, request) | {"max_sequence_length": TEXT_TOKENS}


FAMILY = QwenImage()
