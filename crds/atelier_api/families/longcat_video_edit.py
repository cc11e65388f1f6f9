"""Sizes of LongCat-Video where it is shown frames of the clip: those of LongCat-Video, whose weights it has."""

from dataclasses import replace

from atelier_api.families.longcat_video import FACTS as LONGCAT_VIDEO

FACTS = replace(
    LONGCAT_VIDEO,
    name="longcat_video_edit",
    title="LongCat-Video, image to video and continuation of clips",
    flavours=(replace(LONGCAT_VIDEO.flavours[0], frames=("first",)),),
    continues=True,
)
