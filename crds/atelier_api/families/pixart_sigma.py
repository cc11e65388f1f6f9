"""Sizes of PixArt Sigma."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_XL = Flavour(
    name="xl-2-1024",
    source="hf://PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    parameters=610_856_096,
    layers=28,
    width=1152,
    mlp_width=4608,
    text_tokens=300,
    encoder_parameters=4_762_310_656,
    vae_parameters=83_653_863,
    activation_bytes_per_token=44_000,
    quantized_share=0.97,
    control_parameters=294_917_760,
    control_layers=13,
)

FACTS = FamilyFacts(
    name="pixart_sigma",
    title="PixArt Sigma",
    modality="image",
    objective="diffusion",
    pixel_multiple=16,
    latent_channels=4,
    latent_factor=8,
    patch=2,
    shift="none",
    licence="CreativeML Open RAIL++-M",
    flavours=(
        _XL,
        replace(_XL, name="xl-2-512", source="hf://PixArt-alpha/PixArt-Sigma-XL-2-512-MS"),
        replace(
            _XL,
            name="900m",
            source="hf://terminusresearch/pixart-900m-1024-ft-v0.6",
            parameters=908_433_824,
            layers=42,
        ),
    ),
    pipelines=("PixArtSigmaPipeline",),
    lora_component="transformer",
    kohya=False,
    uncontrolled="",
)
