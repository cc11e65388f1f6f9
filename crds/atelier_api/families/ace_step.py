"""Sizes of ACE-Step 1.5."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

# A caption with its metadata, lyrics and a token of timbre.
_TEXT_TOKENS = 256 + 2048 + 1

_BASE = Flavour(
    name="base",
    source="hf://Runware/acestep-v15-base-diffusers",
    parameters=1_575_458_880,
    layers=24,
    width=2048,
    mlp_width=6144,
    text_tokens=_TEXT_TOKENS,
    encoder_parameters=1_204_146_176,
    vae_parameters=168_695_426,
    activation_bytes_per_token=93_000,
    quantized_share=0.95,
)
_XL_BASE = replace(
    _BASE,
    name="xl-base",
    source="hf://ACE-Step/acestep-v15-xl-base-diffusers",
    parameters=4_168_897_088,
    layers=32,
    width=2560,
    mlp_width=9728,
    activation_bytes_per_token=142_000,
    quantized_share=0.97,
)

FACTS = FamilyFacts(
    name="ace_step",
    title="ACE-Step 1.5, text to music",
    modality="audio",
    objective="flow",
    pixel_multiple=1,
    latent_channels=64,
    latent_factor=1920,
    patch=2,
    shift=3.0,
    licence="MIT",
    flavours=(
        _BASE,
        replace(_BASE, name="sft", source="hf://Runware/acestep-v15-sft-diffusers"),
        _XL_BASE,
        replace(
            _XL_BASE,
            name="xl-turbo",
            source="hf://ACE-Step/acestep-v15-xl-turbo-diffusers",
            guidance="distilled",
        ),
    ),
    pipelines=("AceStepPipeline",),
    kohya=False,
    sample_rate=48_000,
    own_shift=True,
    negative_prompts=False,
    passages=Passages(Passage(643, tile=30 * 48_000), Passage(643, tile=512 * 1920)),
    time_vectors=7,
)
