"""Stable Diffusion 3 and 3.5."""

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from family_models.kinds import Published, Tiny
from family_models.parts import clip_config, clip_tokenizer, kl_autoencoder, seeded, t5_encoder, t5_tokenizer
from family_models.published_parts import CLIP_G, CLIP_L, kl_16, t5_xxl


def tiny() -> StableDiffusion3Pipeline:
    clip_width, t5_width = 16, 40
    return StableDiffusion3Pipeline(
        transformer=seeded(
            lambda: SD3Transformer2DModel(
                sample_size=8,
                in_channels=16,
                out_channels=16,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=t5_width,
                caption_projection_dim=32,
                pooled_projection_dim=2 * clip_width,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(16, 1.5305, 0.0609),
        text_encoder=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, clip_width))),
        tokenizer=clip_tokenizer(),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, clip_width))),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(t5_width),
        tokenizer_3=t5_tokenizer(),
    )


TINY = {"sd3": Tiny(tiny)}

SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
PUBLISHED = Published(
    denoisers={
        "3.5-medium": (
            SD3Transformer2DModel,
            SD3_MEDIUM
            | {
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        "3.5-large": (
            SD3Transformer2DModel,
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
        ),
        "3-medium": (SD3Transformer2DModel, SD3_MEDIUM | {"pos_embed_max_size": 192}),
    },
    encoders=lambda: [CLIPTextModelWithProjection(CLIP_L), CLIPTextModelWithProjection(CLIP_G), t5_xxl()],
    autoencoder=kl_16,
)
