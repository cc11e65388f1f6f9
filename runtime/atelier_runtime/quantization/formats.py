"""The kinds: how a weight becomes packed tensors, and how it comes back. Plain torch, which any device can do.

A weight of int8 moves by at most 1/254 of the largest in its row, one of fp8 (e4m3) by at most 1/16 of itself, the smallest apart.
nf4 has the sixteen quantiles of a normal distribution, scaled by blocks of 64 weights (arXiv:2305.14314): a weight moves by at most
0.152 of the largest in its block, half the widest gap between two values.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from atelier_api.quantizations import NF4_BLOCK, NF4_SCALES_BLOCK, Quantization

Packed = dict[str, Tensor]
"""The tensors that a weight is kept as, by name; each has at least one dimension."""

SMALLEST = 1e-12
"""What the largest weight of a row or a block counts as at least: a row of zeros would be divided by zero."""

PIECE = 1 << 16
"""Blocks that are packed at once, 4 million weights: finding their codes takes many times the bytes of the weights."""


class Format(ABC):
    """One kind. An object without state."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Packed:
        """[outputs, inputs] in a floating dtype, quantised on the weight's device."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight again, [outputs, inputs] in `dtype`: a new tensor, on the device of `packed`."""


class ByRow(Format):
    """Numbers of one byte, and an fp32 scale for each row that brings its largest weight to the `largest` of them."""

    def __init__(self, dtype: torch.dtype, largest: float) -> None:
        self.dtype, self.largest = dtype, largest

    def pack(self, weight: Tensor) -> Packed:
        scale = weight.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST) / self.largest
        values = weight / scale
        return {"values": (values if self.dtype.is_floating_point else values.round_()).to(self.dtype), "scale": scale}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        # bf16 holds the values exactly, and their product with an fp32 scale is rounded once, whatever it is written to.
        return packed["values"].to(dtype).mul_(packed["scale"])


INT8 = ByRow(torch.int8, 127)


class Nf4(Format):
    """Two weights a byte. The blocks' scales, less their mean, are quantised themselves, to int8 in rows of 256."""

    def pack(self, weight: Tensor) -> Packed:
        blocks = _rows(weight.flatten(), NF4_BLOCK)
        scales = blocks.abs().amax(1, keepdim=True).float()
        pieces = zip(torch.split(blocks, PIECE), torch.split(scales, PIECE), strict=True)
        mean = scales.mean()
        packed = INT8.pack(_rows((scales - mean).flatten(), NF4_SCALES_BLOCK))
        return {
            "values": torch.cat([_bytes(*piece) for piece in pieces]),
            "scales": packed["values"].flatten()[: len(blocks)],  # FSDP2 splits along the first dimension
            "scale_of_scales": packed["scale"],
            "mean_of_scales": mean.reshape(1),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        values = packed["values"]
        scales = _rows(packed["scales"], NF4_SCALES_BLOCK) * packed["scale_of_scales"]
        scales = scales.flatten()[: len(values), None] + packed["mean_of_scales"]
        pairs = functional.embedding(values.int(), _pairs(values.device, dtype))
        return pairs.view(-1, NF4_BLOCK).mul_(scales).flatten()[: shape[0] * shape[1]].view(shape)


FORMATS: Mapping[Quantization, Format] = {"int8": INT8, "fp8": ByRow(torch.float8_e4m3fn, 448), "nf4": Nf4()}


def nf4_values() -> Tensor:
    """[16] in fp32, from -1 to 1: eight quantiles above the middle of a normal distribution, zero, and seven below.

    The outermost are halfway between the last ones of 16 and of 15 equal parts (section 3 and appendix E of arXiv:2305.14314).
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (torch.linspace(edge, 0.5, count, dtype=torch.float64)[:-1] for count in (9, 8))
    values = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above).flip(0)])
    return (values / values.max()).float()


def _rows(values: Tensor, length: int) -> Tensor:
    """As rows of `length`, the last one filled with zeros."""
    return functional.pad(values, (0, -values.numel() % length)).view(-1, length)


def _bytes(blocks: Tensor, scales: Tensor) -> Tensor:
    """[blocks, 32] bytes of [blocks, 64] weights: the number of the nearest value of each, the first of two in the upper half."""
    values = nf4_values().to(blocks.device)
    codes = torch.bucketize(blocks / scales.clamp(min=SMALLEST), (values[1:] + values[:-1]) / 2, out_int32=True)
    return (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8)


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: the two values that a byte stands for."""
    values = nf4_values()
    return torch.cartesian_prod(values, values).to(device, dtype)
