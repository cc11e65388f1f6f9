"""Stable Diffusion XL."""

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from family_models.kinds import Published, Tiny
from family_models.parts import clip_config, clip_tokenizer, kl_autoencoder, seeded
from family_models.published_parts import CLIP_G, CLIP_L, published_kl


def tiny() -> StableDiffusionXLPipeline:
    clip_width, projection = 16, 24
    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(4, 0.13025, None),
        text_encoder=seeded(lambda: CLIPTextModel(clip_config(clip_width, clip_width))),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, projection))),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=seeded(
            lambda: UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=(2, 2),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=2 * clip_width,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + projection,
            )
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


TINY = {"sdxl": Tiny(tiny)}

PUBLISHED = Published(
    denoisers={
        "base-1.0": (
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
    },
    encoders=lambda: [CLIPTextModel(CLIP_L), CLIPTextModelWithProjection(CLIP_G)],
    autoencoder=lambda: published_kl(4),
)
