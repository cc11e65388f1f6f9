"""Kinds of a quantised frozen base: what the API, the planner and the runtime must agree on. Imports nothing of ours."""

from typing import Literal, get_args

Quantization = Literal["int8", "fp8", "nf4"]

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
"""The kinds, from the mildest: `int8` and `fp8` take the same memory, and `int8` errs less."""

SCALE_BYTES = 4
"""Scales are fp32, but for the blocks' of nf4."""

NF4_BLOCK = 64
"""Weights that share a scale of nf4."""

NF4_SCALES_BLOCK = 256
"""Scales of nf4 that share a scale of their own: each of them is one byte (double quantisation, arXiv:2305.14314)."""

NF4_INDEX_BYTES = 2
"""Bytes for each weight of a layer of nf4 while it is unpacked, beside the weight itself: a 4-byte index looks up two."""


def packed_bytes(kind: Quantization, outputs: int, inputs: int) -> int:
    """Bytes that a linear layer with `outputs` x `inputs` weights keeps for them, scales included."""
    weights = outputs * inputs
    if kind != "nf4":
        return weights + outputs * SCALE_BYTES
    blocks = -(-weights // NF4_BLOCK)
    rows = -(-blocks // NF4_SCALES_BLOCK)
    # Two weights a byte in whole blocks, a byte for each scale, the scales of the scales, and their mean.
    return blocks * (NF4_BLOCK // 2 + 1) + rows * SCALE_BYTES + SCALE_BYTES


def unpacked_bytes(kind: Quantization, weight_bytes: int) -> int:
    """Bytes for each weight of the layer that is unpacked, which is in a dtype of `weight_bytes`."""
    return weight_bytes + (NF4_INDEX_BYTES if kind == "nf4" else 0)
