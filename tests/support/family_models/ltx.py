"""LTX Video."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import Tensor

from family_models.kinds import Published, Tiny
from family_models.parts import seeded, t5_encoder, t5_tokenizer
from family_models.published_parts import t5_xxl

WIDTH, HEIGHT, FRAMES = 96, 64, 9  # 3 x 2 latent pixels in 2 latent frames


def autoencoder() -> AutoencoderKLLTXVideo:
    """Of the published compression, 8 x 32 x 32. Its channels have means and deviations of their own, as the published ones."""
    sizes = (8, 8, 8, 8)
    vae = seeded(
        lambda: AutoencoderKLLTXVideo(
            latent_channels=128,
            block_out_channels=sizes,
            decoder_block_out_channels=sizes,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        )
    )
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 128))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, 128))
    return vae


def tiny() -> LTXPipeline:
    text_width = 24
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
        ),
        vae=autoencoder(),
        text_encoder=t5_encoder(text_width),
        tokenizer=t5_tokenizer(),
        transformer=seeded(
            lambda: LTXVideoTransformer3DModel(
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=text_width,
            )
        ),
    )


def unpacked(pipe: LTXPipeline, packed: Tensor) -> Tensor:
    frames = (FRAMES - 1) // pipe.vae_temporal_compression_ratio + 1
    side = pipe.vae_spatial_compression_ratio
    return LTXPipeline._unpack_latents(packed, frames, HEIGHT // side, WIDTH // side)


TINY = {
    "ltx": Tiny(
        tiny,
        to_grid=unpacked,
        from_grid=lambda _, grid: LTXPipeline._pack_latents(grid),
        width=WIDTH,
        height=HEIGHT,
        frames=FRAMES,
    )
}

PUBLISHED = Published(
    denoisers={"0.9.0": (LTXVideoTransformer3DModel, {})},
    encoders=lambda: [t5_xxl()],
    autoencoder=AutoencoderKLLTXVideo,
)
