"""Sizes of LongCat-Image-Edit: those of LongCat-Image. The reference adds as many tokens as its own picture has, and those that the
text encoder makes of it.
"""

from dataclasses import replace

from atelier_api.families.longcat_image import FACTS as LONGCAT_IMAGE

FACTS = replace(
    LONGCAT_IMAGE,
    name="longcat_image_edit",
    title="LongCat-Image-Edit, edits of pictures",
    flavours=(
        replace(
            LONGCAT_IMAGE.flavours[0],
            source="hf://meituan-longcat/LongCat-Image-Edit",
            text_tokens=512 + 326,  # a picture of 504 x 504, and the two tokens around it
        ),
    ),
    pipelines=("LongCatImageEditPipeline",),
    references=1,
    sample_edge=1024,
)
