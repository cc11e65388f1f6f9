"""What techniques and the passes of few-step generators hold in memory, beside what training holds without. Pure arithmetic."""

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


TIME_WAVES = 256
"""Numbers that a time embedder makes of a time before its two layers."""


def few_step_parameters(spec: TrainingRunSpec, family: FamilyFacts, width: int) -> int:
    """Of the second time embedder, two layers up to the `width` of a block or several, and what is added at negative times."""
    if spec.objective.twin_flow is None:
        return 0
    if family.time_embedder_parameters:
        return family.time_embedder_parameters
    return (TIME_WAVES + 1 + family.time_vectors * (width + 2)) * width


def swapped_bytes(spec: TrainingRunSpec, trained_bytes: int) -> int:
    """For each trained weight, the copy that is kept aside while the moving average is in its place for the teacher's passes."""
    return 0 if spec.objective.twin_flow is None else trained_bytes
