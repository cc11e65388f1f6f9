"""Sizes of Z-Image."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_TURBO = Flavour(
    name="turbo",
    source="hf://Tongyi-MAI/Z-Image-Turbo",
    parameters=6_154_908_736,
    layers=34,
    text_blocks=2,
    width=3840,
    mlp_width=10240,
    text_tokens=512,
    encoder_parameters=4_022_468_096,
    vae_parameters=83_819_683,
    activation_bytes_per_token=247_000,
)

FACTS = FamilyFacts(
    name="z_image",
    title="Z-Image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="Apache-2.0",
    flavours=(_TURBO, replace(_TURBO, name="base", source="hf://Tongyi-MAI/Z-Image")),
    pipelines=("ZImagePipeline",),
    guidance_above=0.0,
    uncontrolled="diffusers' network for it borrows modules of the base, and fails where gradients are asked for",
)
