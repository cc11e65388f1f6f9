"""Sizes of Kolors: Stable Diffusion XL's blocks, told of text by a language model of 6 billion parameters."""

from atelier_api.families.facts import FamilyFacts, Flavour

FACTS = FamilyFacts(
    name="kolors",
    title="Kwai Kolors",
    modality="image",
    objective="diffusion",
    pixel_multiple=8,
    latent_channels=4,
    latent_factor=8,
    # A UNet has no tokens of one size: this is the side of those in its deepest level, where 60 of the 70 transformer blocks are.
    patch=4,
    shift="none",
    licence="Kolors Model License Agreement",
    flavours=(
        Flavour(
            name="1.0",
            source="hf://terminusresearch/kwai-kolors-1.0",
            parameters=2_579_458_820,
            layers=70,
            width=1280,
            mlp_width=5120,
            text_tokens=256,
            encoder_parameters=6_243_584_000,
            vae_parameters=83_653_863,
            activation_bytes_per_token=88_000,
            largest_block=1_206_568_960,
            quantized_share=0.85,
        ),
    ),
    pipelines=("KolorsPipeline",),
    quantization_doubt="its activations fill the memory rather than its weights, and its convolutions stay as they are",
    backward_blocks=5,  # that of Stable Diffusion XL, which has the same blocks
    kohya=False,
)
