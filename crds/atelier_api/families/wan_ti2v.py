"""Sizes of Wan 2.2 TI2V-5B, whose latents are others than those of the larger models."""

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

FACTS = FamilyFacts(
    name="wan_ti2v",
    title="Wan 2.2 TI2V-5B, image to video",
    modality="video",
    objective="flow",
    pixel_multiple=32,
    latent_channels=48,
    latent_factor=16,
    patch=2,
    shift=5.0,
    licence="Apache-2.0",
    flavours=(
        Flavour(
            name="2.2-ti2v-5b",
            source="hf://Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            parameters=4_999_787_712,
            layers=30,
            width=3072,
            mlp_width=14336,
            text_tokens=512,
            encoder_parameters=5_680_910_336,
            vae_parameters=704_688_668,
            activation_bytes_per_token=261_000,
            frames=("first",),
        ),
    ),
    frame_rule=(4, 1),
    temporal_factor=4,
    frame_rate=24.0,
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    passages=Passages(Passage(660, frames=3), Passage(1815, frames=3, tile=256)),
)
