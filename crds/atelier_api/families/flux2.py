"""Sizes of Flux.2."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_DEV = Flavour(
    name="dev",
    source="hf://black-forest-labs/FLUX.2-dev",
    parameters=32_223_281_152,
    layers=56,
    width=6144,
    mlp_width=18432,
    text_tokens=512,
    encoder_parameters=24_011_361_280,
    vae_parameters=84_046_115,
    activation_bytes_per_token=319_000,
    largest_block=981_467_648,
    guidance="distilled",
    quantized_share=0.97,
)

FACTS = FamilyFacts(
    name="flux2",
    title="Flux.2",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=128,
    latent_factor=16,
    patch=1,
    shift="empirical",
    own_shift=True,
    licence="FLUX [dev] Non-Commercial License v2.0; klein 4B: Apache-2.0",
    flavours=(
        _DEV,
        replace(
            _DEV,
            name="klein-base-9b",
            source="hf://black-forest-labs/FLUX.2-klein-base-9B",
            parameters=9_078_581_248,
            layers=32,
            width=4096,
            mlp_width=12288,
            encoder_parameters=8_190_735_360,
            activation_bytes_per_token=212_000,
            largest_block=436_208_128,
            guidance="on",
            quantized_share=0.96,
        ),
        replace(
            _DEV,
            name="klein-base-4b",
            source="hf://black-forest-labs/FLUX.2-klein-base-4B",
            parameters=3_875_544_576,
            layers=25,
            width=3072,
            mlp_width=9216,
            encoder_parameters=4_022_468_096,
            activation_bytes_per_token=159_000,
            largest_block=245_367_296,
            guidance="on",
            quantized_share=0.94,
        ),
    ),
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
)
