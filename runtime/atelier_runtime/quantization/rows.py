"""What int8 and fp8 share: torchao's tensors with one scale for each row."""

import logging

import torch
from torch import Tensor

# Its import makes torch note that something of it will be an error one day, on stderr and as no JSON line.
_NOTES = logging.getLogger("torch.utils._pytree")
_level = _NOTES.level
_NOTES.setLevel(logging.ERROR)
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow  # noqa: E402

_NOTES.setLevel(_level)

__all__ = ["Float8Tensor", "Int8Tensor", "PerRow", "by_row"]


def by_row(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [outputs, inputs], which `dtype` holds exactly, times the fp32 `scale` [outputs, 1], rounded to `dtype` once.

    To the bit what `dequantize` of these tensors gives, which keeps a copy or two of the weight in fp32 meanwhile.
    """
    return values.to(dtype).mul_(scale)
