"""What a sample costs on its way through the autoencoder, whole or in tiles, and which of both a run may choose. Pure."""

from itertools import product

from atelier_api.families import FamilyFacts
from atelier_api.families.facts import Passage
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_operator.planner.extents import Extent, drawn_extent, encoded_extent

JOINED_VALUES = 12
"""Values for each pixel of a sample that is made in pieces: three channels, of overlapping tiles up to 16/9 as many pixels as of the
sample, of their rows, and of the whole, with some to spare; of a sound, fewer."""


def passage_values(passage: Passage, extent: Extent, *, tiled: bool) -> int:
    """Values that the autoencoder holds at once of a sample of this size."""
    whole = extent.width * extent.height * extent.frames
    piece = _tile(passage, extent) if tiled else extent
    frames = piece.frames if _is_sound(extent) else min(extent.frames, passage.frames or extent.frames)
    pixels = piece.width * piece.height * frames
    return pixels * passage.values + (whole * JOINED_VALUES if pixels < whole else 0)


def tilings(spec: TrainingRunSpec, family: FamilyFacts) -> list[tuple[bool, bool]]:
    """What the spec leaves open of tiles for what is encoded, and for what is drawn; best first.

    Tiles are tried where they would hold less, and first for what is drawn: that changes nothing that is trained on.
    """
    passages, wanted = family.passages, spec.model.autoencoder_tiling
    if wanted == "never" or passages.untiled:
        return [(False, False)]
    if wanted == "always":
        return [(True, True)]
    encoding = _saves(passages.encoding, encoded_extent(spec, family))
    drawing = bool(spec.validation.prompts) and _saves(passages.decoding, drawn_extent(spec, family))
    return list(product((False, True) if encoding else (False,), (False, True) if drawing else (False,)))


def _saves(passage: Passage, extent: Extent) -> bool:
    return passage_values(passage, extent, tiled=True) < passage_values(passage, extent, tiled=False)


def _tile(passage: Passage, extent: Extent) -> Extent:
    if _is_sound(extent):
        return extent._replace(frames=min(extent.frames, passage.tile))
    return extent._replace(width=min(extent.width, passage.tile), height=min(extent.height, passage.tile))


def _is_sound(extent: Extent) -> bool:
    return extent.width == 1
