"""AuraFlow."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from family_models.kinds import Published, Tiny
from family_models.parts import kl_autoencoder, seeded, t5_tokenizer
from family_models.published_parts import published_kl


def tiny() -> AuraFlowPipeline:
    t5_width = 24
    encoder = UMT5Config(
        vocab_size=32, d_model=t5_width, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=seeded(lambda: UMT5EncoderModel(encoder)),
        vae=kl_autoencoder(4, 0.13025, None),
        transformer=seeded(
            lambda: AuraFlowTransformer2DModel(
                sample_size=8,
                num_mmdit_layers=2,
                num_single_dit_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=t5_width,
                caption_projection_dim=32,
                pos_embed_max_size=64,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


TINY = {"auraflow": Tiny(tiny)}

PILE_T5_XL = UMT5Config(
    vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
)
PUBLISHED = Published(
    denoisers={
        "0.3": (AuraFlowTransformer2DModel, {"pos_embed_max_size": 96**2}),
        "0.2": (AuraFlowTransformer2DModel, {"pos_embed_max_size": 64**2}),
        "0.1": (AuraFlowTransformer2DModel, {"pos_embed_max_size": 64**2}),
    },
    encoders=lambda: [UMT5EncoderModel(PILE_T5_XL)],
    autoencoder=lambda: published_kl(4),
)
