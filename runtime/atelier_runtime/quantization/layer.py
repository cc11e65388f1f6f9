"""A linear layer whose frozen weight is kept packed.

The libraries have layers of their own. Three things that training needs are not theirs, and are the same for every kind here
(decision 0017): autograd keeps the packed weight alone for the backward pass, autocast decides the precision of the product as it does
for any linear layer, and the packed weight is plain bytes, which FSDP2 shards and gathers like any other parameter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from atelier_runtime.quantization.formats import Format

PREFIX = "packed_"


class QuantizedLinear(nn.Linear):
    """`x @ weight.T + bias` with the weight as `form` packs it. `weight` is unpacked anew each time it is asked for.

    The packed tensors are parameters without gradient, as bytes: what casts floating parameters, or looks for a module's dtype,
    passes them by.
    """

    _kept: ClassVar[dict["QuantizedLinear", Tensor] | None] = None

    def __init__(self, layer: Any, form: Format, device: torch.device) -> None:
        nn.Module.__init__(self)
        weight: Tensor = layer.weight
        self.out_features, self.in_features = weight.shape
        self.form, self.weight_dtype = form, weight.dtype
        self._dtypes: dict[str, torch.dtype] = {}
        for name, tensor in form.pack(weight.detach().to(device)).items():
            self._dtypes[name] = tensor.dtype
            whole_bytes = tensor.contiguous().view(torch.uint8)
            self.register_parameter(PREFIX + name, Parameter(whole_bytes, requires_grad=False))
        bias = None if layer.bias is None else Parameter(layer.bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        kept = QuantizedLinear._kept
        if kept is None:
            return self.unpacked(self._packed())
        if self not in kept:
            kept.clear()  # before the next one is unpacked: there is memory for one
            kept[self] = self.unpacked(self._packed())
        return kept[self]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _FrozenLinear.apply(x, self, *self._packed())  # type: ignore[no-untyped-call]
        return result

    def unpacked(self, packed: Sequence[Tensor]) -> Tensor:
        """The weight in the dtype that it had, from the packed tensors in their order."""
        tensors = {name: raw.view(dtype) for (name, dtype), raw in zip(self._dtypes.items(), packed, strict=True)}
        return self.form.unpack(tensors, (self.out_features, self.in_features), self.weight_dtype)

    def _packed(self) -> list[Tensor]:
        return [getattr(self, PREFIX + name) for name in self._dtypes]


@contextmanager
def unpacked_once() -> Iterator[None]:
    """Inside, the weight of the layer that was asked last is kept, and no packed weight may change.

    peft asks a layer twenty times for its weight, for the most part whether it has one, before a LoRA is on it.
    """
    QuantizedLinear._kept = {}
    try:
        yield
    finally:
        QuantizedLinear._kept = None


class _FrozenLinear(torch.autograd.Function):
    """The product with a weight that is unpacked for it, and unpacked again for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, *packed: Tensor) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(*packed)
        return functional.linear(x, layer.unpacked(packed), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        packed = ctx.saved_tensors  # recomputation gives them once
        weight = ctx.layer.unpacked(packed).to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None, *(None for _ in packed)
