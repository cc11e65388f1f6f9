"""LongCat-Video, text to video: flow matching on clips, with a network and a pipeline of our own, as diffusers has neither.

All of it is in `atelier_runtime.family_parts.longcat_video`; the family that is shown frames of the clip is `longcat_video_edit`.
"""

from atelier_runtime.family_parts.longcat_video import LongCatVideoNetwork


class LongCatVideo(LongCatVideoNetwork):
    """LongCat-Video, trained on text alone."""

    name = "longcat_video"


FAMILY = LongCatVideo()
