"""Stable Diffusion XL."""

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from family_models.kinds import Published, Tiny
from family_models.parts import clip_config, clip_tokenizer, euler_scheduler, kl_autoencoder, seeded, text_time_unet
from family_models.published_parts import CLIP_G, CLIP_L, SDXL_UNET, published_kl


def tiny() -> StableDiffusionXLPipeline:
    clip_width, projection = 16, 24
    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(4, 0.13025, None),
        text_encoder=seeded(lambda: CLIPTextModel(clip_config(clip_width, clip_width))),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, projection))),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=text_time_unet(2 * clip_width, projection),
        scheduler=euler_scheduler(beta_end=0.012),
        add_watermarker=False,
    )


TINY = {"sdxl": Tiny(tiny)}

PUBLISHED = Published(
    denoisers={"base-1.0": (UNet2DConditionModel, SDXL_UNET | {"projection_class_embeddings_input_dim": 2816})},
    encoders=lambda: [CLIPTextModel(CLIP_L), CLIPTextModelWithProjection(CLIP_G)],
    autoencoder=lambda: published_kl(4),
)
