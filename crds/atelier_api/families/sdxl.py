"""Sizes of Stable Diffusion XL."""

from atelier_api.families.facts import FamilyFacts, Flavour, Vocabulary

FACTS = FamilyFacts(
    name="sdxl",
    title="Stable Diffusion XL",
    modality="image",
    objective="diffusion",
    pixel_multiple=8,
    latent_channels=4,
    latent_factor=8,
    # A UNet has no tokens of one size: this is the side of those in its deepest level, where 60 of the 70 transformer blocks are.
    patch=4,
    shift="none",
    licence="CreativeML Open RAIL++-M",
    flavours=(
        Flavour(
            name="base-1.0",
            source="hf://stabilityai/stable-diffusion-xl-base-1.0",
            parameters=2_567_463_684,
            layers=70,
            width=1280,
            mlp_width=5120,
            text_tokens=77,
            encoder_parameters=817_720_320,
            vae_parameters=83_653_863,
            activation_bytes_per_token=101_000,
            largest_block=1_206_568_960,
            quantized_share=0.85,
            control_parameters=1_251_014_160,
            control_layers=34,
        ),
    ),
    pipelines=("StableDiffusionXLPipeline",),
    quantization_doubt="its activations fill the memory rather than its weights, and its convolutions stay as they are",
    vocabularies=(
        Vocabulary("clip_l", "tokenizer", "text_encoder"),
        Vocabulary("clip_g", "tokenizer_2", "text_encoder_2"),
    ),
    backward_blocks=5,  # 4.2 measured: LoRA on an H200, 1024 x 1024, batch 4
    uncontrolled="",
    control_pixels=True,
)
