"""What techniques hold in memory, beside what training holds without them. Pure arithmetic on sizes."""

from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_operator.planner.extents import trained_extent

LAYER_SYNC_BYTES = 5 * 4
"""Bytes for each token and unit of width while LayerSync compares two blocks: five fp32 copies, two of them for the backward pass."""


def compared_bytes(spec: TrainingRunSpec, family: FamilyFacts, width: int) -> int:
    """What is held of the tokens of one sample, each of `width` numbers in a block, at the end of the forward pass."""
    if spec.techniques.layer_sync is None:
        return 0
    return family.latent_tokens(*trained_extent(spec, family)) * width * LAYER_SYNC_BYTES
