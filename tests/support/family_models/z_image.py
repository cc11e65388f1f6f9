"""Z-Image."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from family_models.kinds import Published, Tiny, from_the_positive
from family_models.parts import chat_tokenizer, kl_autoencoder, seeded
from family_models.published_parts import kl_16


def tiny() -> ZImagePipeline:
    tokenizer = chat_tokenizer()
    width = 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=seeded(lambda: Qwen3Model(config)),
        tokenizer=tokenizer,
        transformer=seeded(
            lambda: ZImageTransformer2DModel(
                in_channels=16,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=width,
                axes_dims=[4, 6, 6],
                axes_lens=[544, 32, 32],
            )
        ),
    )


TINY = {"z_image": Tiny(tiny, guidance_off=0.0, combine=from_the_positive)}

QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
PUBLISHED = Published(
    denoisers={
        "turbo": (ZImageTransformer2DModel, {}),
        "base": (ZImageTransformer2DModel, {}),
    },
    encoders=lambda: [Qwen3Model(QWEN3_4B)],
    autoencoder=kl_16,
)
