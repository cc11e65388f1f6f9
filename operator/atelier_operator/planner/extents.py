"""How large a sample is that is trained on or drawn. Pure."""

from typing import NamedTuple

from atelier_api.families import FamilyFacts
from atelier_api.family_rules import bucket_alignment
from atelier_api.v1alpha1 import TrainingRunSpec


class Extent(NamedTuple):
    """The size of a sample in pixels and frames; a sound is of 1 x 1, and its frames are samples."""

    width: int
    height: int
    frames: int


def bucket_size(spec: TrainingRunSpec, family: FamilyFacts) -> int:
    """Edge in pixels of the square bucket, rounded up: no bucket is much larger than this square."""
    align = bucket_alignment(spec, family)
    return -(-spec.data.resolution // align) * align


def trained_extent(spec: TrainingRunSpec, family: FamilyFacts) -> Extent:
    """The largest sample that is trained on, or nearly."""
    if family.sample_rate is not None:
        return Extent(1, 1, spec.data.audio.max_seconds * family.sample_rate)
    size = bucket_size(spec, family)
    return Extent(size, size, spec.data.clip.frames if family.modality == "video" else 1)


def encoded_extent(spec: TrainingRunSpec, family: FamilyFacts) -> Extent:
    """The largest sample or reference picture that is encoded, or nearly."""
    extent = trained_extent(spec, family)
    if not family.references:
        return extent
    size = max(extent.width, family.reference_resolution(spec.data.resolution))
    return extent._replace(width=size, height=size)


def drawn_extent(spec: TrainingRunSpec, family: FamilyFacts) -> Extent:
    """A sample of a prompt."""
    validation, data = spec.validation, spec.data
    if family.sample_rate is not None:
        return Extent(1, 1, (validation.seconds or data.audio.max_seconds) * family.sample_rate)
    frames = (validation.frames or data.clip.frames) if family.modality == "video" else 1
    edge = family.sample_edge or data.resolution
    return Extent(validation.width or edge, validation.height or edge, frames)
