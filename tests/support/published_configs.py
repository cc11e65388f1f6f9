"""The configs of published checkpoints, as far as they differ from the defaults of their classes, and of what comes with them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}

DENOISERS: dict[tuple[str, str], tuple[type[nn.Module], dict[str, Any]]] = {
    ("sd3", "3.5-medium"): (
        SD3Transformer2DModel,
        SD3_MEDIUM
        | {
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    ("sd3", "3.5-large"): (
        SD3Transformer2DModel,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    ("sd3", "3-medium"): (SD3Transformer2DModel, SD3_MEDIUM | {"pos_embed_max_size": 192}),
    ("flux", "dev"): (FluxTransformer2DModel, {"guidance_embeds": True}),
    ("flux", "krea"): (FluxTransformer2DModel, {"guidance_embeds": True}),
    ("flux", "schnell"): (FluxTransformer2DModel, {}),
    ("sdxl", "base-1.0"): (
        UNet2DConditionModel,
        {
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
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    ("z_image", "turbo"): (ZImageTransformer2DModel, {}),
    ("z_image", "base"): (ZImageTransformer2DModel, {}),
    ("wan", "2.1-t2v-1.3b"): (WanTransformer3DModel, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
    ("wan", "2.1-t2v-14b"): (WanTransformer3DModel, WAN_14B),
    ("wan", "2.2-t2v-a14b"): (WanTransformer3DModel, WAN_14B),
}


def published_denoiser(family: str, flavour: str) -> nn.Module:
    """The denoiser in bf16 on the meta device: shapes without memory."""
    model, config = DENOISERS[family, flavour]
    return without_memory(lambda: model(**config)).to(torch.bfloat16)


def without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
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
QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def t5_xxl() -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=32128, **XXL))


ENCODERS: dict[str, Callable[[], list[nn.Module]]] = {
    "sd3": lambda: [CLIPTextModelWithProjection(CLIP_L), CLIPTextModelWithProjection(CLIP_G), t5_xxl()],
    "flux": lambda: [CLIPTextModel(CLIP_L), t5_xxl()],
    "sdxl": lambda: [CLIPTextModel(CLIP_L), CLIPTextModelWithProjection(CLIP_G)],
    "z_image": lambda: [Qwen3Model(QWEN3_4B)],
    "wan": lambda: [UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))],
}


def kl_autoencoder(channels: int, **config: Any) -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        **config,
    )


def kl_16() -> nn.Module:
    return kl_autoencoder(16, use_quant_conv=False, use_post_quant_conv=False)


AUTOENCODERS: dict[str, Callable[[], nn.Module]] = {
    "sd3": kl_16,
    "flux": kl_16,
    "sdxl": lambda: kl_autoencoder(4),
    "z_image": kl_16,
    "wan": AutoencoderKLWan,
}
