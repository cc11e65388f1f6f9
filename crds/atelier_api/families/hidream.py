"""Sizes of HiDream-I1."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_FULL = Flavour(
    name="full",
    source="hf://HiDream-ai/HiDream-I1-Full",
    parameters=17_105_733_184,
    layers=48,
    width=2560,
    mlp_width=6912,
    text_tokens=384,
    encoder_parameters=13_611_232_256,
    vae_parameters=83_819_683,
    activation_bytes_per_token=195_000,
    largest_block=424_089_600,
    quantized_share=0.96,
    control_parameters=1_722_749_440,
    control_layers=4,
)

FACTS = FamilyFacts(
    name="hidream",
    title="HiDream-I1",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="MIT; its Llama encoder: Llama 3.1 Community License",
    flavours=(
        _FULL,
        replace(_FULL, name="dev", source="hf://HiDream-ai/HiDream-I1-Dev"),
        replace(_FULL, name="fast", source="hf://HiDream-ai/HiDream-I1-Fast"),
    ),
    pipelines=("HiDreamImagePipeline",),
    uncontrolled="",
)
