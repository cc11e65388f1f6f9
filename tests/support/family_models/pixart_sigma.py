"""PixArt Sigma."""

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from family_models.kinds import Published, Tiny
from family_models.parts import kl_autoencoder, seeded, t5_encoder, t5_tokenizer
from family_models.published_parts import published_kl, t5_xxl


def tiny() -> PixArtSigmaPipeline:
    t5_width = 24
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(t5_width),
        vae=kl_autoencoder(4, 0.13025, None),
        transformer=seeded(
            lambda: PixArtTransformer2DModel(
                sample_size=8,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                cross_attention_dim=32,
                caption_channels=t5_width,
                use_additional_conditions=False,
            )
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


TINY = {"pixart_sigma": Tiny(tiny)}

SIGMA = {"caption_channels": 4096, "use_additional_conditions": False}
PUBLISHED = Published(
    denoisers={
        "xl-2-1024": (PixArtTransformer2DModel, SIGMA | {"interpolation_scale": 2}),
        "xl-2-512": (PixArtTransformer2DModel, SIGMA | {"sample_size": 64, "interpolation_scale": 1}),
        "900m": (PixArtTransformer2DModel, SIGMA | {"num_layers": 42, "interpolation_scale": 2}),
    },
    encoders=lambda: [t5_xxl()],
    autoencoder=lambda: published_kl(4),
)
