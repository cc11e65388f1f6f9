"""Sizes of Wan 2.1 and 2.2, text to video and image to video."""

from dataclasses import replace

from atelier_api.families.autoencoders import CAUSAL
from atelier_api.families.facts import FamilyFacts, Flavour

_LARGE = Flavour(
    name="2.1-t2v-14b",
    source="hf://Wan-AI/Wan2.1-T2V-14B-Diffusers",
    parameters=14_288_491_584,
    layers=40,
    width=5120,
    mlp_width=13824,
    text_tokens=512,
    encoder_parameters=5_680_910_336,
    vae_parameters=126_892_531,
    activation_bytes_per_token=271_000,
)

_SHOWN = replace(
    _LARGE,
    name="2.1-i2v-14b-480p",
    source="hf://Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    parameters=16_394_878_784,
    text_tokens=512 + 257,
    encoder_parameters=_LARGE.encoder_parameters + 630_766_080,  # CLIP's view of the picture
    frames=("first",),
)

FACTS = FamilyFacts(
    name="wan",
    title="Wan 2.1 and 2.2, text to video and image to video",
    modality="video",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="Apache-2.0",
    flavours=(
        Flavour(
            name="2.1-t2v-1.3b",
            source="hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            parameters=1_418_996_800,
            layers=30,
            width=1536,
            mlp_width=8960,
            text_tokens=512,
            encoder_parameters=5_680_910_336,
            vae_parameters=126_892_531,
            activation_bytes_per_token=91_000,
        ),
        _LARGE,
        replace(_LARGE, name="2.2-t2v-a14b", source="hf://Wan-AI/Wan2.2-T2V-A14B-Diffusers", experts=2),
        _SHOWN,
        replace(_SHOWN, name="2.1-i2v-14b-720p", source="hf://Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        replace(
            _SHOWN,
            name="2.1-flf2v-14b-720p",
            source="hf://Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            parameters=16_395_536_704,
            text_tokens=512 + 2 * 257,
            frames=("first", "last"),
        ),
        replace(
            _LARGE,
            name="2.2-i2v-a14b",
            source="hf://Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            parameters=14_288_901_184,
            experts=2,
            frames=("first",),
        ),
    ),
    frame_rule=(4, 1),
    temporal_factor=4,
    frame_rate=16.0,
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    passages=CAUSAL,
)
