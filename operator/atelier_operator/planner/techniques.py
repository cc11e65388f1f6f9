"""What techniques hold in memory, beside what training holds without them. Pure arithmetic on sizes."""

from atelier_api.v1alpha1.techniques import Techniques

LAYER_SYNC_BYTES = 5 * 4
"""Bytes for each token and unit of width while LayerSync compares two blocks: five fp32 copies, two of them for the backward pass."""


def compared_bytes(techniques: Techniques, tokens: int, width: int) -> int:
    """What is held of so many tokens of what is drawn at the end of the forward pass, each `width` numbers in a block."""
    return tokens * width * LAYER_SYNC_BYTES if techniques.layer_sync else 0
