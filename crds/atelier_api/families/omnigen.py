"""Sizes of OmniGen."""

from atelier_api.families.facts import FamilyFacts, Flavour

FACTS = FamilyFacts(
    name="omnigen",
    title="OmniGen, text to image",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=4,
    latent_factor=8,
    patch=2,
    shift=1.0,
    licence="MIT",
    flavours=(
        Flavour(
            name="v1",
            source="hf://Shitao/OmniGen-v1-diffusers",
            parameters=3_762_072_592,
            layers=32,
            width=3072,
            mlp_width=8192,
            text_tokens=256,  # of a long caption: they are not cut
            encoder_parameters=0,  # the denoiser reads the tokens itself
            vae_parameters=83_653_863,
            activation_bytes_per_token=136_000,
            quantized_share=0.96,
        ),
    ),
    pipelines=("OmniGenPipeline",),
    lora_component="transformer",
    kohya=False,
)
