"""Sizes of LongCat-Image."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_BASE = Flavour(
    name="base",
    source="hf://meituan-longcat/LongCat-Image",
    parameters=6_270_668_864,
    layers=30,
    width=3072,
    mlp_width=12288,
    text_tokens=512,
    encoder_parameters=8_292_166_656,
    vae_parameters=83_819_683,
    activation_bytes_per_token=111_000,
    largest_block=339_831_296,
)

FACTS = FamilyFacts(
    name="longcat_image",
    title="LongCat-Image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift="dynamic",
    licence="Apache-2.0",
    flavours=(_BASE, replace(_BASE, name="dev", source="hf://meituan-longcat/LongCat-Image-Dev")),
    pipelines=("LongCatImagePipeline",),
    lora_component="transformer",
    kohya=False,
)
