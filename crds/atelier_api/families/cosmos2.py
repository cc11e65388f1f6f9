"""Sizes of Cosmos-Predict2, text to image."""

from dataclasses import replace

from atelier_api.families.autoencoders import CAUSAL_STILL
from atelier_api.families.facts import FamilyFacts, Flavour

_SMALL = Flavour(
    name="2b",
    source="hf://nvidia/Cosmos-Predict2-2B-Text2Image",
    parameters=1_956_405_248,
    layers=28,
    width=2048,
    mlp_width=8192,
    text_tokens=512,
    encoder_parameters=4_864_791_552,
    vae_parameters=126_892_531,
    activation_bytes_per_token=116_000,
)

FACTS = FamilyFacts(
    name="cosmos2",
    title="Cosmos-Predict2, text to image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=1.0,
    licence="NVIDIA Open Model License",
    flavours=(
        _SMALL,
        replace(
            _SMALL,
            name="14b",
            source="hf://nvidia/Cosmos-Predict2-14B-Text2Image",
            parameters=14_265_265_152,
            layers=36,
            width=5120,
            mlp_width=20480,
            activation_bytes_per_token=290_000,
        ),
    ),
    pipelines=("Cosmos2TextToImagePipeline",),
    lora_component="transformer",
    kohya=False,
    quantization_doubt="trainers that offer it advise against it",
    passages=CAUSAL_STILL,
    time_vectors=4,  # three, and waves as wide as a block
)
