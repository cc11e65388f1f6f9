"""Sizes of Lumina-Image 2.0."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_BASE = Flavour(
    name="2.0",
    source="hf://Alpha-VLLM/Lumina-Image-2.0",
    parameters=2_609_769_152,
    layers=30,
    text_blocks=2,
    width=2304,
    mlp_width=9216,
    text_tokens=256,
    encoder_parameters=2_614_341_888,
    vae_parameters=83_819_683,
    activation_bytes_per_token=172_000,
)

FACTS = FamilyFacts(
    name="lumina2",
    title="Lumina-Image 2.0",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=6.0,
    licence="Apache-2.0; Neta Lumina: Fair AI Public License 1.0-SD",
    flavours=(_BASE, replace(_BASE, name="neta-v1", source="hf://terminusresearch/neta-lumina-v1")),
    pipelines=("Lumina2Pipeline",),
    kohya=False,
)
