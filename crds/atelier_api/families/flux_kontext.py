"""Sizes of Flux.1 Kontext: those of Flux.1 dev, which it was made from. A reference adds as many tokens as its own picture has."""

from dataclasses import replace

from atelier_api.families.flux import FACTS as FLUX

FACTS = replace(
    FLUX,
    name="flux_kontext",
    title="Flux.1 Kontext, edits of pictures",
    licence="FLUX.1 [dev] Non-Commercial License",
    flavours=(replace(FLUX.flavours[0], source="hf://black-forest-labs/FLUX.1-Kontext-dev"),),
    pipelines=("FluxKontextPipeline",),
    references=1,
)
