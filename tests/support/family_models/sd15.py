"""Stable Diffusion 1.5, and 2.1, which predicts v."""

from typing import Any

from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from family_models.kinds import Published, Tiny
from family_models.parts import clip_config, clip_tokenizer, kl_autoencoder, seeded
from family_models.published_parts import CLIP_L, published_kl

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tiny_15() -> StableDiffusionPipeline:
    return pipeline(PNDMScheduler(**NOISE, skip_prk_steps=True), text_width=16, attention_head_dim=2)


def tiny_21() -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return pipeline(scheduler, text_width=24, attention_head_dim=(2, 4), use_linear_projection=True)


def pipeline(scheduler: Any, *, text_width: int, **unet: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=kl_autoencoder(4, 0.18215, None),
        text_encoder=seeded(lambda: CLIPTextModel(clip_config(text_width, text_width))),
        tokenizer=clip_tokenizer(),
        unet=seeded(
            lambda: UNet2DConditionModel(
                sample_size=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                cross_attention_dim=text_width,
                **unet,
            )
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


TINY = {"sd15": Tiny(tiny_15, steps=5), "sd21": Tiny(tiny_21)}

UNET_15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
CLIP_H = CLIPTextConfig(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
)

PUBLISHED = Published(
    denoisers={
        "1.5": (UNet2DConditionModel, UNET_15),
        "2.1": (UNet2DConditionModel, UNET_21 | {"sample_size": 96}),
        "2.1-base": (UNet2DConditionModel, UNET_21 | {"sample_size": 64}),
    },
    encoders=lambda: [CLIPTextModel(CLIP_L)],
    encoders_of=dict.fromkeys(("2.1", "2.1-base"), lambda: [CLIPTextModel(CLIP_H)]),
    autoencoder=lambda: published_kl(4),
)
