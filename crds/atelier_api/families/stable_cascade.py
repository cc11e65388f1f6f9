"""Sizes of Stable Cascade, stage C."""

from dataclasses import replace
from fractions import Fraction

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

_LARGE = Flavour(
    name="3.6b",
    source="hf://stabilityai/stable-cascade-prior",
    parameters=3_589_103_632,
    layers=64,
    width=2048,
    mlp_width=8192,
    text_tokens=77,
    encoder_parameters=694_659_840,
    # The encoder's 20 million, and the decoder's: stage B, 1.56 billion, and stage A.
    vae_parameters=1_601_545_998,
    activation_bytes_per_token=84_000,
)

FACTS = FamilyFacts(
    name="stable_cascade",
    title="Stable Cascade, stage C",
    modality="image",
    objective="diffusion",
    pixel_multiple=128,
    latent_channels=16,
    latent_factor=Fraction(128, 3),  # the encoder reduces by 32, and is shown three quarters of the picture's size
    patch=1,
    shift="none",
    licence="Stability AI Non-Commercial Research Community License",
    flavours=(
        _LARGE,
        replace(
            _LARGE,
            name="1b",
            parameters=1_030_785_040,
            layers=32,
            width=1536,
            mlp_width=6144,
            activation_bytes_per_token=63_000,
        ),
    ),
    pipelines=("StableCascadePipeline", "StableCascadePriorPipeline"),
    library="atelier_runtime.networks",
    autoencoder=("effnet", "decoder", "vqgan"),
    noise_schedule="cosine",
    needs_fp32="its time is rounded to the precision of the weights and then multiplied by 10000, and bf16 has 8 bits",
    quantizations=(),
    quantization_doubt="it trains in fp32 throughout, and no trainer that has it quantises it",
    kohya=False,
    lora_component="prior",
    passages=Passages(
        Passage(768, tile=0),
        Passage(768, tile=0),
        untiled="its encoder is a classifier's and its decoder a diffusion of its own, and neither works on tiles",
    ),
)
