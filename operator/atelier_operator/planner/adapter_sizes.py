"""What an adapter puts on one linear layer: its trained parameters, exactly, and what its forward pass keeps. Pure arithmetic.

Parameters are those of peft and of lycoris-lora (a test builds each one and counts). What is kept for the backward pass was measured
on lycoris-lora's modules, with torch's own operations.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from atelier_api.v1alpha1.adapter import (
    BoftAdapter,
    DiagOftAdapter,
    DyloraAdapter,
    FullAdapter,
    Ia3Adapter,
    LayerAdapter,
    LohaAdapter,
    LokrAdapter,
    rebuilds_weights,
)

FP32 = 4
"""Bytes of the precision in which changed weights are computed."""


@dataclass(frozen=True)
class Linear:
    """A linear layer with `outputs` x `inputs` weights."""

    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


def parameters(adapter: LayerAdapter | FullAdapter, layer: Linear) -> int:
    """Parameters that are trained on the layer. Of IA³ with `inputTargets`, which know modules by name, the larger side counts."""
    match adapter:
        case LokrAdapter():
            count = sum(_kronecker(adapter, layer))
        case LohaAdapter():
            count = 2 * adapter.rank * (layer.outputs + layer.inputs)
        case DiagOftAdapter():
            block, blocks = divided(layer.outputs, adapter.block_size)
            return blocks * block * block
        case BoftAdapter():
            return butterfly_stages(layer.outputs, adapter.block_size) * layer.outputs * _butterfly(layer, adapter)
        case DyloraAdapter():
            return adapter.rank * (layer.outputs + layer.inputs)
        case Ia3Adapter():
            return max(layer.outputs, layer.inputs) if adapter.input_targets else layer.outputs
        case FullAdapter():
            return layer.weights
        case _:
            count = adapter.rank * (layer.outputs + layer.inputs)
    return count + (layer.outputs if adapter.dora else 0)


def kept_bytes(adapter: LayerAdapter, layer: Linear, tokens: int, precision_bytes: int) -> int:
    """What the layer keeps for the backward pass beside what LoRA would, mostly changed weights that are computed as a whole."""
    if isinstance(adapter, BoftAdapter):
        stages = butterfly_stages(layer.outputs, adapter.block_size)
        return layer.weights * (FP32 * (stages + 1) + precision_bytes)
    if isinstance(adapter, DiagOftAdapter):
        copied = FP32 if precision_bytes < FP32 else 0
        return layer.weights * (copied + precision_bytes)
    if rebuilds_weights(adapter):
        return layer.weights * (FP32 + precision_bytes)
    if isinstance(adapter, LohaAdapter):
        return layer.weights * precision_bytes
    if isinstance(adapter, LokrAdapter):
        # The product of the input with the second factor, once for each column of the first.
        (rows, _), (columns, _) = _factors(adapter, layer)
        return tokens * layer.outputs // rows * columns * precision_bytes
    if isinstance(adapter, Ia3Adapter):
        return tokens * layer.outputs * precision_bytes  # the output that is scaled; an input is kept for LoRA as well
    if isinstance(adapter, DyloraAdapter):
        return parameters(adapter, layer) * precision_bytes  # the ranks in use, put together
    return 0


def divided(size: int, factor: int) -> tuple[int, int]:
    """lycoris-lora's two factors of a side, the smaller first: `factor` and the rest, or the divisors nearest below it."""
    divisor = factor if size % factor == 0 else 1
    candidate = 1
    while size % factor and divisor * divisor < size and candidate < factor:
        candidate += 1
        if size % candidate == 0:
            divisor = candidate
    rest = size // divisor
    return min(divisor, rest), max(divisor, rest)


def butterfly_block(size: int, limit: int) -> int | None:
    """Side of BOFT's blocks: the largest even one up to `limit` that cuts the side into a power of two; None: there is none."""
    fitting = [block for block in range(2, limit + 1, 2) if size % block == 0 and (size // block).bit_count() == 1]
    return max(fitting, default=None)


def butterfly_stages(size: int, limit: int) -> int:
    """Rotations that BOFT applies one after the other."""
    return (size // (butterfly_block(size, limit) or limit) - 1).bit_count() + 1


def _butterfly(layer: Linear, adapter: BoftAdapter) -> int:
    """The block's side. A side that no block fits is refused by the runtime, which knows the layers; here it counts as if one did."""
    return butterfly_block(layer.outputs, adapter.block_size) or adapter.block_size


def _factors(adapter: LokrAdapter, layer: Linear) -> tuple[tuple[int, int], tuple[int, int]]:
    return divided(layer.outputs, adapter.factor), divided(layer.inputs, adapter.factor)


def _kronecker(adapter: LokrAdapter, layer: Linear) -> Iterator[int]:
    """Parameters of the first factor and of the second: whole, or low-rank where the rank is below half the longer side."""
    (rows_1, rows_2), (columns_1, columns_2) = _factors(adapter, layer)
    for rows, columns, may_be_low in ((rows_1, columns_1, adapter.decompose_both), (rows_2, columns_2, True)):
        low = may_be_low and adapter.rank < max(rows, columns) / 2
        yield adapter.rank * (rows + columns) if low else rows * columns
