"""An autoencoder that works on overlapping tiles, one after the other, so that a tile bounds what it holds and not the sample.

Cutting and blending at the seams are diffusers' own. Attention and the statistics of norms see a tile instead of the sample: latents
and pixels are those of the tile, blended over its edges. A sample that is no larger than a tile is as it was, to the bit.
"""

import logging
from typing import Any

from atelier_runtime.family import Family

log = logging.getLogger(__name__)

OVERLAP = 15
"""Of sounds, a tile reaches over into either neighbour by this part of its length, one fifteenth: two seconds of thirty."""


def work_on_tiles(pipe: Any, family: Family) -> None:
    """Have the pipeline's autoencoder encode and decode what is larger than the family's tiles in such. Stays so for its lifetime.

    Raises ValueError for a family whose autoencoder does not work on tiles: `atelier_api.family_rules` refuses to ask for them.
    """
    passages = family.facts.passages
    if passages.untiled:
        raise ValueError(f"{family.name} has no tiles, and was not refused: {passages.untiled}")
    autoencoder = getattr(pipe, family.facts.autoencoder[0])
    autoencoder.enable_tiling()
    tile = passages.encoding.tile
    # Some have tiles whose size is the checkpoint's, which may be as large as any sample, or too small for a picture to be seen in.
    if hasattr(autoencoder, "tile_sample_min_size"):
        autoencoder.tile_sample_min_size = tile
        autoencoder.tile_latent_min_size = tile // 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if hasattr(autoencoder, "tile_sample_min_length"):
        autoencoder.tile_sample_min_length, autoencoder.tile_sample_overlap = tile, tile // OVERLAP
    log.info("the autoencoder works on tiles", extra={"tile": tile})
