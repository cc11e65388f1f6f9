"""What a kind of quantisation has to say: how a weight becomes packed tensors, and how it comes back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Packed = dict[str, Tensor]
"""The tensors that a weight is kept as, by name; each has at least one dimension."""


class Format(ABC):
    """One kind. An object without state."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Packed:
        """[outputs, inputs] in a floating dtype, quantised on the weight's device."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight again, [outputs, inputs] in `dtype`: a new tensor, on the device of `packed`."""
