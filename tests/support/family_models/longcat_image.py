"""LongCat-Image."""

from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel

from family_models.kinds import Published, Tiny
from family_models.parts import add_words, chat_tokenizer, kl_autoencoder, seeded, vision_language_encoder
from family_models.published_parts import kl_16, qwen25_vl_7b
from family_models.scene import HEIGHT, WIDTH


def tiny() -> LongCatImagePipeline:
    text_width = 32
    pipe = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=vision_language_encoder(text_width, vocabulary=512),
        tokenizer=chat_tokenizer(),
        text_processor=None,
        transformer=seeded(
            lambda: LongCatImageTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=text_width,
                axes_dims_rope=[4, 6, 6],
            )
        ),
    )
    add_words(pipe.tokenizer, pipe.prompt_template_encode_prefix + pipe.prompt_template_encode_suffix)
    return pipe


TINY = {
    "longcat_image": Tiny(
        tiny,
        to_grid=lambda pipe, packed: LongCatImagePipeline._unpack_latents(packed, HEIGHT, WIDTH, pipe.vae_scale_factor),
        from_grid=lambda _, grid: LongCatImagePipeline._pack_latents(grid, *grid.shape),
        guided={"guidance_scale": 3.0, "enable_cfg_renorm": False},
    )
}

PUBLISHED_CONFIG = {"num_layers": 10, "num_single_layers": 20}
PUBLISHED = Published(
    denoisers={
        "base": (LongCatImageTransformer2DModel, PUBLISHED_CONFIG),
        "dev": (LongCatImageTransformer2DModel, PUBLISHED_CONFIG),
    },
    encoders=lambda: [qwen25_vl_7b()],
    autoencoder=kl_16,
)
