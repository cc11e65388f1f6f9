"""Sizes of LongCat-Video."""

from atelier_api.families.autoencoders import CAUSAL
from atelier_api.families.facts import FamilyFacts, Flavour

FACTS = FamilyFacts(
    name="longcat_video",
    title="LongCat-Video, text to video",
    modality="video",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=12.0,
    licence="MIT",
    flavours=(
        Flavour(
            name="13.6b",
            source="hf://meituan-longcat/LongCat-Video",
            parameters=13_581_071_424,
            layers=48,
            width=4096,
            mlp_width=11008,
            text_tokens=512,
            encoder_parameters=5_680_910_336,
            vae_parameters=126_892_531,
            activation_bytes_per_token=260_000,
            quantized_share=0.95,
        ),
    ),
    frame_rule=(4, 1),
    temporal_factor=4,
    frame_rate=15.0,
    pipelines=("LongCatVideoPipeline",),
    library="atelier_runtime.networks",
    kohya=False,
    lora_component="dit",
    passages=CAUSAL,
)
