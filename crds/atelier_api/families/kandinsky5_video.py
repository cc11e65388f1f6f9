"""Sizes of Kandinsky 5.0 Video."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

_LITE = Flavour(
    name="t2v-lite-sft-5s",
    source="hf://kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    parameters=2_007_702_848,
    layers=34,
    text_blocks=2,
    width=1792,
    mlp_width=7168,
    text_tokens=512,
    encoder_parameters=8_415_227_136,
    vae_parameters=246_478_803,
    activation_bytes_per_token=94_000,
    largest_block=59_668_480,
    quantized_share=0.85,
    fp32_share=0.139,
)
_PRO = Flavour(
    name="t2v-pro-sft-5s",
    source="hf://kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers",
    parameters=19_311_325_248,
    layers=64,
    text_blocks=4,
    width=4096,
    mlp_width=16384,
    text_tokens=512,
    encoder_parameters=8_415_227_136,
    vae_parameters=246_478_803,
    activation_bytes_per_token=213_000,
    largest_block=306_254_336,
    quantized_share=0.87,
    fp32_share=0.124,
)

FACTS = FamilyFacts(
    name="kandinsky5_video",
    title="Kandinsky 5.0 Video, text to video",
    modality="video",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="MIT",
    flavours=(
        _LITE,
        replace(
            _LITE,
            name="t2v-lite-pretrain-5s",
            source="hf://kandinskylab/Kandinsky-5.0-T2V-Lite-pretrain-5s-Diffusers",
        ),
        _PRO,
        replace(
            _PRO,
            name="t2v-pro-pretrain-5s",
            source="hf://kandinskylab/Kandinsky-5.0-T2V-Pro-pretrain-5s-Diffusers",
        ),
    ),
    frame_rule=(4, 1),
    temporal_factor=4,
    frame_rate=24.0,
    pipelines=("Kandinsky5T2VPipeline",),
    kohya=False,
    passages=Passages(Passage(905, frames=13, tile=256), Passage(1500, frames=14, tile=256)),
)
