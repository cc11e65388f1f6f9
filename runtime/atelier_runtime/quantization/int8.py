"""int8: symmetric, one scale for each row, by torchao. A weight moves by at most 1/255 of the largest in its row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from atelier_runtime.quantization.format import Format, Packed
from atelier_runtime.quantization.rows import Int8Tensor, PerRow, by_row


class Int8(Format):
    def pack(self, weight: Tensor) -> Packed:
        tensor = Int8Tensor.from_hp(weight, PerRow())
        return {"values": tensor.qdata, "scale": tensor.scale}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return by_row(packed["values"], packed["scale"], dtype)


FORMAT = Int8()
