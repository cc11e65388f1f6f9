"""fp8: e4m3, one scale for each row, by torchao. A weight moves by at most 1/16 of itself, the smallest ones apart.

The weights are stored in fp8 and multiplied in the run's precision: any device can do it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from atelier_runtime.quantization.format import Format, Packed
from atelier_runtime.quantization.rows import Float8Tensor, PerRow, by_row

SMALLEST_ROW = 1e-12
"""What the largest weight of a row counts as at least: torchao divides by it, and a row of zeros would become NaN."""


class Fp8(Format):
    def pack(self, weight: Tensor) -> Packed:
        tensor = Float8Tensor.from_hp(weight, torch.float8_e4m3fn, PerRow(), hp_value_lb=SMALLEST_ROW)
        return {"values": tensor.qdata, "scale": tensor.scale.float()}

    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return by_row(packed["values"], packed["scale"], dtype)


FORMAT = Fp8()
