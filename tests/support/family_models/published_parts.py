"""Parts of published sizes that several families share."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import (
    CLIPTextConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)


def without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, on the meta device. Drawing first weights, of which there are none, would take half the time."""
    with ExitStack() as stack:
        for layer in (nn.Linear, _ConvNd, nn.Embedding):
            stack.enter_context(mock.patch.object(layer, "reset_parameters"))
        stack.enter_context(torch.device("meta"))
        return build()


def clip(width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )


CLIP_L = clip(768, 12, 12)
CLIP_G = clip(1280, 32, 20)
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


def t5_xxl() -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=32128, **XXL))


def published_kl(channels: int, **config: Any) -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        **config,
    )


def kl_16() -> nn.Module:
    return published_kl(16, use_quant_conv=False, use_post_quant_conv=False)


def qwen25_vl_7b() -> nn.Module:
    """Qwen2.5-VL-7B, vision tower and output layer included, as pipelines load it that encode text with it."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
"""But for the width of the vector for the whole text."""
