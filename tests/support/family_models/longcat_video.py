"""LongCat-Video: its pipeline is ours, built here of tiny parts."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from atelier_runtime.networks import LongCatVideoPipeline, LongCatVideoTransformer3DModel
from family_models.kinds import Published, Tiny
from family_models.parts import seeded, t5_tokenizer
from family_models.published_parts import XXL


def longcat_transformer(zero_pad: bool) -> LongCatVideoTransformer3DModel:
    return seeded(
        lambda: LongCatVideoTransformer3DModel(
            hidden_size=32,
            depth=2,
            num_heads=2,
            caption_channels=24,
            mlp_ratio=2,
            adaln_tembed_dim=16,
            frequency_embedding_size=32,
            text_tokens_zero_pad=zero_pad,
        )
    )


def tiny() -> LongCatVideoPipeline:
    encoder = UMT5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    autoencoder = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return LongCatVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=seeded(lambda: UMT5EncoderModel(encoder)),
        vae=seeded(lambda: AutoencoderKLWan(z_dim=16, temperal_downsample=[False, True, True], **autoencoder)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=12.0),
        dit=longcat_transformer(zero_pad=True),
    )


def projected(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """CFG-zero* for one sample: the negative prediction gives way to the positive one's projection on it."""
    direction = negative.flatten() / negative.norm()
    base = (torch.dot(positive.flatten(), direction) * direction).view_as(negative)
    return guidance * positive + (1 - guidance) * base


TINY = {"longcat_video": Tiny(tiny, combine=projected)}
PUBLISHED = Published(
    denoisers={"13.6b": (LongCatVideoTransformer3DModel, {"text_tokens_zero_pad": True})},
    encoders=lambda: [UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))],
    autoencoder=AutoencoderKLWan,
)
