"""LongCat-Video that is shown frames of the clip: the parts of LongCat-Video."""

import torch
from torch import Tensor

from family_models import longcat_video
from family_models.kinds import Published, Tiny
from family_models.longcat_video import projected

SHOWN_FRAMES, SHOWN_LATENTS = 5, 2


def projected_on_what_is_drawn(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Guidance of a continued clip: the frames that are shown have no part in the projection."""
    drawn = projected(positive[:, :, SHOWN_LATENTS:], negative[:, :, SHOWN_LATENTS:], guidance)
    return torch.cat([positive[:, :, :SHOWN_LATENTS], drawn], dim=2)


TINY = {
    "longcat_video_edit": Tiny(longcat_video.tiny, combine=projected),
    "longcat_video_continued": Tiny(
        longcat_video.tiny,
        combine=projected_on_what_is_drawn,
        frames=9,
        shown=SHOWN_FRAMES,
        steps=3 + 10,  # of 4 even steps three are in the upper half of the noise, and ten take the place of the last
    ),
}

PUBLISHED = Published(
    denoisers=longcat_video.PUBLISHED.denoisers,
    encoders=longcat_video.PUBLISHED.encoders,
    autoencoder=longcat_video.PUBLISHED.autoencoder,
)
