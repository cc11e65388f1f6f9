"""Sizes of Chroma 1."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_BASE = Flavour(
    name="base",
    source="hf://lodestones/Chroma1-Base",
    parameters=8_899_983_424,
    layers=57,
    width=3072,
    mlp_width=12288,
    text_tokens=512,
    encoder_parameters=4_762_310_656,
    vae_parameters=83_819_683,
    activation_bytes_per_token=120_000,  # of which 9 thousand are the mask, one for each block
    largest_block=226_548_224,
    quantized_share=0.96,
)

FACTS = FamilyFacts(
    name="chroma",
    title="Chroma 1",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=1.0,
    licence="Apache-2.0",
    flavours=(
        _BASE,
        replace(_BASE, name="hd", source="hf://lodestones/Chroma1-HD"),
        replace(_BASE, name="flash", source="hf://lodestones/Chroma1-Flash"),
    ),
    pipelines=("ChromaPipeline",),
    time_embedder_parameters=279_342_080,
)
