"""Sizes of HunyuanVideo 1.5."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

_HUB = "hf://hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-"
_480P = Flavour(
    name="480p-t2v",
    source=f"{_HUB}480p_t2v",
    parameters=8_326_608_160,
    layers=56,
    text_blocks=2,
    width=2048,
    mlp_width=8192,
    text_tokens=1256,
    encoder_parameters=7_289_934_080,
    vae_parameters=1_260_634_115,
    activation_bytes_per_token=153_000,  # nearly half of it for attention's mask, a square of all tokens, at 81 frames
    largest_block=151_056_896,
)

FACTS = FamilyFacts(
    name="hunyuan_video15",
    title="HunyuanVideo 1.5, text to video",
    modality="video",
    objective="flow",
    pixel_multiple=16,
    latent_channels=32,
    latent_factor=16,
    patch=1,
    shift=5.0,
    licence="Tencent Hunyuan Community License",
    flavours=(
        _480P,
        replace(_480P, name="720p-t2v", source=f"{_HUB}720p_t2v"),
        # Distilled on guidance, but without an embedding of it: the checkpoint's guider asks for guidance 1.
        replace(_480P, name="480p-t2v-distilled", source=f"{_HUB}480p_t2v_distilled", guidance="off"),
    ),
    frame_rule=(4, 1),
    temporal_factor=4,
    frame_rate=24.0,
    pipelines=("HunyuanVideo15Pipeline",),
    kohya=False,
    lora_component="transformer",
    passages=Passages(Passage(905, frames=0, tile=256), Passage(905, frames=0, tile=256)),
)
