"""Sizes of Flux.1."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_DEV = Flavour(
    name="dev",
    source="hf://black-forest-labs/FLUX.1-dev",
    parameters=11_901_408_320,
    layers=57,
    width=3072,
    mlp_width=12288,
    text_tokens=512,
    encoder_parameters=4_885_371_136,
    vae_parameters=83_819_683,
    activation_bytes_per_token=112_000,
    largest_block=339_831_296,
    guidance="distilled",
    control_parameters=2_952_654_336,
    control_layers=14,
)

FACTS = FamilyFacts(
    name="flux",
    title="Flux.1",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift="dynamic",
    licence="FLUX.1 [dev] Non-Commercial License; schnell: Apache-2.0",
    flavours=(
        _DEV,
        replace(_DEV, name="krea", source="hf://black-forest-labs/FLUX.1-Krea-dev"),
        replace(
            _DEV,
            name="schnell",
            source="hf://black-forest-labs/FLUX.1-schnell",
            parameters=11_891_178_560,
            control_parameters=2_942_424_576,
            text_tokens=256,
            guidance="off",
        ),
    ),
    pipelines=("FluxPipeline",),
    uncontrolled="",
)
