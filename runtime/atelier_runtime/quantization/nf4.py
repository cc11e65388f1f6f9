"""nf4: the sixteen quantiles of a normal distribution, scaled by blocks of 64 weights (arXiv:2305.14314), by bitsandbytes.

The scales are quantised once more, to a byte each in blocks of 256, as QLoRA has it. A weight moves by about 0.152 of the largest in
its block at most: half the widest gap between two neighbouring values.
"""

import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from atelier_api.quantizations import NF4_BLOCK, NF4_SCALES_BLOCK
from atelier_runtime.quantization.format import Format, Packed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on the CPU it warns of a kernel that is not used here
from bitsandbytes.functional import (  # noqa: E402
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)


class Nf4(Format):
    """A weight is handed over as rows of one block each: the library's CPU kernel gives blocks that run on into the next row of a
    weight the scale of another block (0.50.2). Zeros fill the last one."""

    def pack(self, weight: Tensor) -> Packed:
        blocks = functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        values, state = quantize_4bit(blocks, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
        return {
            "values": values.flatten(),
            "scales": state.absmax,
            "scale_of_scales": state.state2.absmax,
            "mean_of_scales": state.offset.reshape(1),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        values, (outputs, inputs) = packed["values"].view(-1, 1), shape
        scales = QuantState(
            absmax=packed["scale_of_scales"],
            blocksize=NF4_SCALES_BLOCK,
            code=_dynamic_map(values.device),
            dtype=torch.float32,
        )
        state = QuantState(
            absmax=packed["scales"],
            shape=torch.Size((len(packed["scales"]), NF4_BLOCK)),
            dtype=dtype,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            code=_quantiles(values.device),
            offset=packed["mean_of_scales"],
            state2=scales,
        )
        return dequantize_4bit(values, state).flatten()[: outputs * inputs].view(shape)


@cache
def _quantiles(device: torch.device) -> Tensor:
    return get_4bit_type("nf4", device=device)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values that a byte of a scale stands for."""
    return create_dynamic_map().to(device)


FORMAT = Nf4()
