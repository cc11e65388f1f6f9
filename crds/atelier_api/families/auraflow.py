"""Sizes of AuraFlow."""

from dataclasses import replace

from atelier_api.families.facts import FamilyFacts, Flavour

_V03 = Flavour(
    name="0.3",
    source="hf://terminusresearch/auraflow-v0.3",
    parameters=6_858_605_568,
    layers=36,
    width=3072,
    mlp_width=8192,
    text_tokens=256,
    encoder_parameters=1_223_550_976,
    vae_parameters=83_653_863,
    activation_bytes_per_token=148_000,
    largest_block=339_738_624,
    control_parameters=1_396_767_744,
    control_layers=4,
)
_V02 = replace(
    _V03,
    name="0.2",
    source="hf://fal/AuraFlow-v0.2",
    parameters=6_842_876_928,  # fewer learnt positions
)

FACTS = FamilyFacts(
    name="auraflow",
    title="AuraFlow",
    modality="image",
    objective="flow",
    pixel_multiple=16,
    latent_channels=4,
    latent_factor=8,
    patch=2,
    shift=1.73,
    licence="Apache-2.0",
    flavours=(
        _V03,
        _V02,
        replace(_V02, name="0.1", source="hf://fal/AuraFlow"),
    ),
    pipelines=("AuraFlowPipeline",),
    kohya=False,
    uncontrolled="",
)
