"""Wan 2.2 TI2V-5B: a residual autoencoder that folds pixels of 2 x 2 into channels, and a time for each token."""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from family_models.kinds import Published, Tiny
from family_models.parts import seeded, t5_tokenizer
from family_models.published_parts import XXL

CHANNELS = 48
FOLDED: dict[str, Any] = {
    "z_dim": CHANNELS,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.01 * channel for channel in range(CHANNELS)],
    "latents_std": [0.5 + 0.01 * channel for channel in range(CHANNELS)],
}


def parts() -> dict[str, Any]:
    encoder = UMT5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": seeded(lambda: UMT5EncoderModel(encoder)),
        "vae": seeded(
            lambda: AutoencoderKLWan(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **FOLDED)
        ),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        "transformer": seeded(
            lambda: WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                text_dim=24,
                freq_dim=32,
                ffn_dim=48,
                num_layers=2,
                rope_max_seq_len=32,
            )
        ),
        "expand_timesteps": True,
    }


def tiny_wan_ti2v() -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(**parts())


def tiny_text_pipeline() -> WanPipeline:
    """The same checkpoint as it is published, in the pipeline that draws from text alone."""
    return WanPipeline(**parts())


TINY = {"wan_ti2v": Tiny(tiny_wan_ti2v)}

PUBLISHED = Published(
    denoisers={
        "2.2-ti2v-5b": (
            WanTransformer3DModel,
            {
                "in_channels": CHANNELS,
                "out_channels": CHANNELS,
                "num_attention_heads": 24,
                "num_layers": 30,
                "ffn_dim": 14336,
            },
        )
    },
    encoders=lambda: [UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))],
    autoencoder=lambda: AutoencoderKLWan(base_dim=160, decoder_base_dim=256, **FOLDED),
)
