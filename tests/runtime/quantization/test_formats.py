"""What each kind does to a weight: how far it moves, bounded by the format itself, and how many bytes are left."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atelier_api.quantizations import NF4_BLOCK, NF4_SCALES_BLOCK, QUANTIZATIONS, Quantization, packed_bytes
from atelier_runtime.quantization import FORMATS
from atelier_runtime.quantization.formats import PIECE, nf4_values

SHAPES = ((128, 96), (64, 64), (16, 16), (33, 48), (48, 30), (7, 5))
"""Also of rows that no block of 64 fits, of an odd number of weights, and of less than one block."""
DTYPES = (torch.float32, torch.bfloat16)
PUBLISHED = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
             0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)  # fmt: skip
"""The values of appendix E of arXiv:2305.14314, which bitsandbytes has too."""
HELD: dict[Quantization, Tensor] = {
    "int8": torch.arange(-127.0, 128.0),
    "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(448.0),
    "nf4": torch.tensor([0.0, 1.0, -1.0, 1.0]).repeat(NF4_BLOCK // 4),
}
"""A row of each kind's own numbers, with the largest."""


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights with an outlier, as real layers have them."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3)) / shape[1] ** 0.5
    drawn[1, 2] *= 20
    return drawn.to(dtype)


def round_trip(kind: Quantization, drawn: Tensor) -> Tensor:
    form = FORMATS[kind]
    return form.unpack(form.pack(drawn), (drawn.shape[0], drawn.shape[1]), drawn.dtype)


def int8_bound(drawn: Tensor) -> Tensor:
    """Half of one of 127 steps up to the row's largest weight."""
    return drawn.abs().amax(1, keepdim=True).expand_as(drawn) / 254


def fp8_bound(drawn: Tensor) -> Tensor:
    """Half of the last of three bits; below the smallest normal number, 2^-6, half of a fixed step of 2^-9. The largest is 448."""
    smallest = drawn.abs().amax(1, keepdim=True) / 448 * 2**-10
    return torch.maximum(drawn.abs() / 16, smallest)


def rows(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values.flatten(), (0, -values.numel() % length)).view(-1, length)


def nf4_bound(drawn: Tensor) -> Tensor:
    """Half the widest gap between two values, times the block's scale, and half of one of 127 steps of the scales themselves."""
    blocks = rows(drawn, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    off = int8_bound(rows(scale - scale.mean(), NF4_SCALES_BLOCK)).flatten()[: len(scale), None]
    bound = scale * torch.tensor(PUBLISHED).diff().max() / 2 + off
    return bound.expand_as(blocks).flatten()[: drawn.numel()].view_as(drawn)


BOUNDS: dict[Quantization, Callable[[Tensor], Tensor]] = {"int8": int8_bound, "fp8": fp8_bound, "nf4": nf4_bound}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_weight_moves_by_no_more_than_the_format_says(
    kind: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    drawn = weight(shape, dtype)
    found, exact = round_trip(kind, drawn), drawn.float()
    assert (found.dtype, found.shape) == (dtype, drawn.shape)
    rounding = torch.finfo(dtype).eps  # of the unpacked weight, and of the values of nf4
    bound = BOUNDS[kind](exact) + rounding * exact.abs() + 1e-7
    assert ((found.float() - exact).abs() <= bound).all()
    assert not torch.equal(found, drawn)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_product_moves_by_no_more_than_the_weights_do(kind: Quantization) -> None:
    drawn = weight((128, 96))
    x = torch.randn(32, 96, generator=torch.Generator().manual_seed(4))
    moved = (x @ round_trip(kind, drawn).T - x @ drawn.T).abs()
    assert (moved <= x.abs() @ BOUNDS[kind](drawn).T + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_planner_counts_the_bytes_that_are_kept(kind: Quantization, shape: tuple[int, int]) -> None:
    packed = FORMATS[kind].pack(weight(shape, torch.bfloat16))
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) == packed_bytes(kind, *shape)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_layers_of_zeros_and_rows_of_zeros_stay_zero(kind: Quantization) -> None:
    drawn = weight((64, 64))
    drawn[5] = 0
    assert not round_trip(kind, drawn)[5].any()
    assert not round_trip(kind, torch.zeros(64, 64)).any()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_largest_weight_of_a_row_stays_what_it_is(kind: Quantization) -> None:
    drawn = weight((33, 48))
    largest = drawn.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(round_trip(kind, drawn).gather(1, largest), drawn.gather(1, largest))


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_weight_that_a_kind_holds_exactly_comes_back_to_the_bit(kind: Quantization) -> None:
    """Numbers of the kind, a scale that is a power of two, and blocks that all have it."""
    drawn = HELD[kind].repeat(3, 1) / 4
    assert torch.equal(round_trip(kind, drawn), drawn)


def test_nf4_has_the_published_values_and_takes_the_nearest() -> None:
    values = nf4_values()
    torch.testing.assert_close(values, torch.tensor(PUBLISHED), atol=2e-7, rtol=1e-6)
    drawn = weight((128, 96))
    scale = drawn.view(-1, NF4_BLOCK).abs().amax(1, keepdim=True)
    nearest = (drawn.view(-1, NF4_BLOCK) / scale).unsqueeze(-1).sub(values).abs().argmin(-1)
    packed = FORMATS["nf4"].pack(drawn)["values"].int()
    assert torch.equal(torch.stack([packed >> 4, packed & 15], -1).flatten(1), nearest)


def test_nf4_is_the_same_whether_a_layer_is_packed_in_one_piece_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = weight((128, 96), torch.bfloat16)
    whole = FORMATS["nf4"].pack(drawn)
    monkeypatch.setattr("atelier_runtime.quantization.formats.PIECE", 5)
    assert drawn.numel() < PIECE * NF4_BLOCK
    assert all(torch.equal(tensor, whole[name]) for name, tensor in FORMATS["nf4"].pack(drawn).items())
