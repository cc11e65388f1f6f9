"""Sizes of Kandinsky 5.0 Image."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_SFT = Flavour(
    name="t2i-lite-sft",
    source="hf://kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
    parameters=6_022_080_576,
    layers=52,
    text_blocks=2,
    width=2560,
    mlp_width=10240,
    text_tokens=512,
    encoder_parameters=8_415_227_136,
    vae_parameters=83_819_683,
    activation_bytes_per_token=127_000,
    largest_block=116_698_112,
    quantized_share=0.89,
    fp32_share=0.102,
)

FACTS = FamilyFacts(
    name="kandinsky5_image",
    title="Kandinsky 5.0 Image, text to image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=16,
    latent_factor=8,
    patch=2,
    shift=3.0,
    licence="MIT",
    flavours=(
        _SFT,
        replace(
            _SFT,
            name="t2i-lite-pretrain",
            source="hf://kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers",
        ),
    ),
    pipelines=("Kandinsky5T2IPipeline",),
    kohya=False,
)
