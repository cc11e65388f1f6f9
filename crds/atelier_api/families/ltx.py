"""Sizes of LTX Video."""

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

FACTS = FamilyFacts(
    name="ltx",
    title="LTX Video, text to video",
    modality="video",
    objective="flow",
    pixel_multiple=32,
    latent_channels=128,
    latent_factor=32,
    patch=1,
    shift="dynamic",
    licence="LTX-Video Open Weights License",
    flavours=(
        Flavour(
            name="0.9.0",
            source="hf://Lightricks/LTX-Video",
            parameters=1_923_385_472,
            layers=28,
            width=2048,
            mlp_width=8192,
            text_tokens=128,
            encoder_parameters=4_762_310_656,
            vae_parameters=419_193_649,
            activation_bytes_per_token=113_000,
            quantized_share=0.97,
        ),
    ),
    frame_rule=(8, 1),
    temporal_factor=8,
    frame_rate=25.0,
    pipelines=("LTXPipeline",),
    passages=Passages(Passage(63, frames=0), Passage(53, frames=0)),
)
