"""Qwen-Image."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from family_models.kinds import Published, Tiny, from_the_negative
from family_models.parts import add_words, chat_tokenizer, seeded, vision_language_encoder
from family_models.published_parts import qwen25_vl_7b
from family_models.scene import HEIGHT, WIDTH


def tiny(**network: Any) -> QwenImagePipeline:
    """`network`: what its transformer has that the published one has not."""
    text_width = 32
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=seeded(lambda: AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)),
        text_encoder=vision_language_encoder(text_width, vocabulary=512),
        tokenizer=chat_tokenizer(),
        transformer=seeded(
            lambda: QwenImageTransformer2DModel(
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=text_width,
                axes_dims_rope=(4, 6, 6),
                **network,
            )
        ),
    )
    add_words(pipe.tokenizer, pipe.prompt_template_encode)
    return pipe


def unpacked(pipe: QwenImagePipeline, packed: Tensor) -> Tensor:
    return QwenImagePipeline._unpack_latents(packed, HEIGHT, WIDTH, pipe.vae_scale_factor).squeeze(2)


def at_the_length_of_the_positive(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """The guided prediction with every token as long as in the positive one; tokens are patches of 2 x 2, here side by side."""
    guided = from_the_negative(positive, negative, guidance)
    lengths = [torch.nn.functional.pixel_unshuffle(grid, 2).norm(dim=1, keepdim=True) for grid in (positive, guided)]
    return guided * (lengths[0] / lengths[1]).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


TINY = {
    "qwen_image": Tiny(
        tiny,
        to_grid=unpacked,
        from_grid=lambda _, grid: QwenImagePipeline._pack_latents(grid, *grid.shape),
        combine=at_the_length_of_the_positive,
        clips=True,
    )
}

PUBLISHED = Published(
    denoisers={"base": (QwenImageTransformer2DModel, {}), "2512": (QwenImageTransformer2DModel, {})},
    encoders=lambda: [qwen25_vl_7b()],
    autoencoder=AutoencoderKLQwenImage,
)
