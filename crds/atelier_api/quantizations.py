"""Kinds of a quantised frozen base: what the API, the planner and the runtime must agree on. Imports nothing of ours."""

from collections.abc import Mapping
from typing import Literal, get_args

Quantization = Literal["int8", "fp8", "nf4"]

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
"""The kinds, from the mildest: `int8` and `fp8` take the same memory, and `int8` errs less."""

LIBRARIES: Mapping[Quantization, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""The optional library of each kind; the extra `quantization` has both."""

SCALE_BYTES = 4
"""Every kind keeps its scales in fp32."""

NF4_BLOCK = 64
"""Weights that share a scale of nf4."""

NF4_SCALES_BLOCK = 256
"""Scales of nf4 that share a scale of their own: each of them is one byte (double quantisation, arXiv:2305.14314)."""


def packed_bytes(kind: Quantization, outputs: int, inputs: int) -> int:
    """Bytes that a linear layer with `outputs` x `inputs` weights keeps for them, scales included."""
    weights = outputs * inputs
    if kind != "nf4":
        return weights + outputs * SCALE_BYTES
    scales = -(-weights // NF4_BLOCK)
    # Two weights a byte in whole blocks, a byte for each scale, the scales of the scales, and their mean.
    return scales * (NF4_BLOCK // 2 + 1) + SCALE_BYTES * -(-scales // NF4_SCALES_BLOCK) + SCALE_BYTES
