"""Sizes of ACE-Step v1."""

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

# A voice, a caption, lyrics.
_TEXT_TOKENS = 1 + 256 + 4096

FACTS = FamilyFacts(
    name="ace_step_v1",
    title="ACE-Step v1, text to music",
    modality="audio",
    objective="flow",
    pixel_multiple=1,
    latent_channels=128,
    latent_factor=4096,
    patch=1,
    shift=3.0,
    licence="Apache-2.0",
    flavours=(
        Flavour(
            name="3.5b",
            source="hf://ACE-Step/ACE-Step-v1-3.5B",
            parameters=3_305_659_264,
            layers=30,
            text_blocks=6,
            width=2560,
            mlp_width=6400,
            text_tokens=_TEXT_TOKENS,
            encoder_parameters=281_861_376,
            vae_parameters=259_817_564,
            activation_bytes_per_token=132_000,
            largest_block=127_905_280,
            quantized_share=0.59,  # feed-forwards are convolutions of one sample
        ),
    ),
    pipelines=("ACEStepPipeline",),
    library="atelier_runtime.networks",
    kohya=False,
    sample_rate=44_100,
    negative_prompts=False,
    lora_component="transformer",
    passages=Passages(
        Passage(643, tile=0),
        Passage(643, tile=0),
        untiled="its spectrograms and its vocoder are of whole sounds",
    ),
)
