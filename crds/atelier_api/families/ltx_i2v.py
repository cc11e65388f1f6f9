"""Sizes of LTX Video where it is shown the first frame: those of LTX Video, whose weights it has."""

from dataclasses import replace

from atelier_api.families.ltx import FACTS as LTX

FACTS = replace(
    LTX,
    name="ltx_i2v",
    title="LTX Video, image to video",
    flavours=tuple(replace(flavour, frames=("first",)) for flavour in LTX.flavours),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
)
