"""Sizes of Sana and Sana 1.5."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour, Passage, Passages

_LARGE = Flavour(
    name="1.5-4.8b",
    source="hf://Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
    parameters=4_721_825_952,
    layers=60,
    width=2240,
    mlp_width=5600,
    text_tokens=300,
    encoder_parameters=2_614_341_888,
    vae_parameters=312_250_275,
    activation_bytes_per_token=175_000,
    quantized_share=0.5,  # the rest are convolutions, as its feed-forward is
)
_MEDIUM = replace(
    _LARGE,
    name="1.5-1.6b",
    source="hf://Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    parameters=1_604_641_952,
    layers=20,
)

FACTS = FamilyFacts(
    name="sana",
    title="Sana and Sana 1.5",
    modality="image",
    objective="flow",
    pixel_multiple=32,
    latent_channels=32,
    latent_factor=32,
    patch=1,
    shift=3.0,
    licence="NVIDIA Open Model License; Sana 1.0: NSCL v2-custom",
    flavours=(
        _LARGE,
        _MEDIUM,
        replace(
            _MEDIUM,
            name="1.6b",
            source="hf://Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            parameters=1_604_462_752,
            activation_bytes_per_token=141_000,  # no norms of queries and keys, which are kept in fp32
            largest_block=77_920_640,
        ),
        replace(
            _MEDIUM,
            name="0.6b",
            source="hf://Efficient-Large-Model/Sana_600M_1024px_diffusers",
            parameters=591_747_872,
            layers=28,
            width=1152,
            mlp_width=2880,
            activation_bytes_per_token=72_000,
        ),
    ),
    pipelines=("SanaPipeline",),
    kohya=False,
    uncontrolled="diffusers' network for it lacks the norms of queries and keys that Sana 1.5 has",
    passages=Passages(Passage(1000), Passage(1000)),
)
