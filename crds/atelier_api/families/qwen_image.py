"""Sizes of Qwen-Image."""

from dataclasses import replace

from atelier_api.families.autoencoders import CAUSAL_STILL
from atelier_api.families.facts import FamilyFacts, Flavour

_BASE = Flavour(
    name="base",
    source="hf://Qwen/Qwen-Image",
    parameters=20_430_401_088,
    layers=60,
    width=3072,
    mlp_width=12288,
    text_tokens=512,
    encoder_parameters=8_292_166_656,
    vae_parameters=126_892_531,
    activation_bytes_per_token=136_000,
    control_parameters=1_768_003_584,
    control_layers=5,
)

FACTS = FamilyFacts(
    name="qwen_image",
    title="Qwen-Image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift="dynamic",
    licence="Apache-2.0",
    flavours=(_BASE, replace(_BASE, name="2512", source="hf://Qwen/Qwen-Image-2512")),
    pipelines=("QwenImagePipeline",),
    uncontrolled="",
    passages=CAUSAL_STILL,
)
