"""Chroma 1."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from family_models.kinds import Published, Tiny
from family_models.parts import kl_autoencoder, seeded, t5_encoder, t5_tokenizer
from family_models.published_parts import kl_16, t5_xxl
from family_models.scene import HEIGHT, WIDTH


def tiny() -> ChromaPipeline:
    t5_width = 24
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=t5_encoder(t5_width),
        tokenizer=t5_tokenizer(),
        transformer=seeded(
            lambda: ChromaTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=t5_width,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16,
                approximator_hidden_dim=32,
                approximator_layers=2,
            )
        ),
    )


TINY = {
    "chroma": Tiny(
        tiny,
        to_grid=lambda pipe, packed: ChromaPipeline._unpack_latents(packed, HEIGHT, WIDTH, pipe.vae_scale_factor),
        from_grid=lambda _, grid: ChromaPipeline._pack_latents(grid, *grid.shape),
    )
}

PUBLISHED = Published(
    denoisers={name: (ChromaTransformer2DModel, {}) for name in ("base", "hd", "flash")},
    encoders=lambda: [t5_xxl()],
    autoencoder=kl_16,
)
