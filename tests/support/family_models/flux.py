"""Flux.1."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from family_models.kinds import Published, Tiny
from family_models.parts import clip_config, clip_tokenizer, kl_autoencoder, seeded, t5_encoder, t5_tokenizer
from family_models.published_parts import CLIP_L, kl_16, t5_xxl
from family_models.scene import HEIGHT, WIDTH


def tiny() -> FluxPipeline:
    clip_width, t5_width = 16, 24
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=seeded(lambda: CLIPTextModel(clip_config(clip_width, clip_width))),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(t5_width),
        tokenizer_2=t5_tokenizer(),
        transformer=seeded(
            lambda: FluxTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=t5_width,
                pooled_projection_dim=clip_width,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        ),
    )


TINY = {
    "flux": Tiny(
        tiny,
        to_grid=lambda pipe, packed: FluxPipeline._unpack_latents(packed, HEIGHT, WIDTH, pipe.vae_scale_factor),
        from_grid=lambda _, grid: FluxPipeline._pack_latents(grid, *grid.shape),
        guidance_off=3.5,
        guided={"true_cfg_scale": 3.0, "negative_prompt": ""},
        embedded=3.5,
    )
}

PUBLISHED = Published(
    denoisers={
        "dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
        "krea": (FluxTransformer2DModel, {"guidance_embeds": True}),
        "schnell": (FluxTransformer2DModel, {}),
    },
    encoders=lambda: [CLIPTextModel(CLIP_L), t5_xxl()],
    autoencoder=kl_16,
)
