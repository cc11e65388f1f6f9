"""What each kind does to a weight: how far it moves, bounded by the format itself, and how many bytes are left."""

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type
from torch import Tensor
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

from atelier_api.errors import ConfigError
from atelier_api.quantizations import LIBRARIES, NF4_BLOCK, QUANTIZATIONS, Quantization, packed_bytes
from atelier_runtime.quantization import load_format

SHAPES = ((128, 96), (64, 64), (16, 16), (33, 48), (48, 30), (7, 5))
"""Also of rows that no block of 64 fits, of an odd number of weights, and of less than one block."""
DTYPES = (torch.float32, torch.bfloat16)


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights with an outlier, as real layers have them."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3)) / shape[1] ** 0.5
    drawn[1, 2] *= 20
    return drawn.to(dtype)


def round_trip(kind: Quantization, drawn: Tensor) -> Tensor:
    form = load_format(kind)
    return form.unpack(form.pack(drawn), (drawn.shape[0], drawn.shape[1]), drawn.dtype)


def int8_bound(drawn: Tensor) -> Tensor:
    """Half a step of 255 between the two signs of the row's largest weight."""
    return drawn.abs().amax(1, keepdim=True).expand_as(drawn) / 255


def fp8_bound(drawn: Tensor) -> Tensor:
    """Half of the last of three bits; below the smallest normal number, 2^-6, half of a fixed step of 2^-9. The largest is 448."""
    smallest = drawn.abs().amax(1, keepdim=True) / 448 * 2**-10
    return torch.maximum(drawn.abs() / 16, smallest)


def nf4_bound(drawn: Tensor) -> Tensor:
    """Half the widest gap between two values, times the block's scale, and half the widest gap of the scales' own byte."""
    blocks = torch.nn.functional.pad(drawn.flatten(), (0, -drawn.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    gap, gap_of_scales = get_4bit_type("nf4", device="cpu").diff().max(), create_dynamic_map().diff().max()
    off = gap_of_scales / 2 * (scale - scale.mean()).abs().max()
    return (scale * gap / 2 + off).expand_as(blocks).flatten()[: drawn.numel()].view_as(drawn)


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
    rounding = torch.finfo(dtype).eps  # of the unpacked weight, and of the scale
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
    packed = load_format(kind).pack(weight(shape, torch.bfloat16))
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) == packed_bytes(kind, *shape)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_layers_of_zeros_and_rows_of_zeros_stay_zero(kind: Quantization) -> None:
    drawn = weight((64, 64))
    drawn[5] = 0
    assert not round_trip(kind, drawn)[5].any()
    assert not round_trip(kind, torch.zeros(64, 64)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_back_as_torchao_itself_has_them(dtype: torch.dtype) -> None:
    drawn = weight((33, 48), dtype)
    assert torch.equal(round_trip("int8", drawn), Int8Tensor.from_hp(drawn, PerRow()).dequantize())
    theirs = Float8Tensor.from_hp(drawn, torch.float8_e4m3fn, PerRow())
    assert torch.equal(round_trip("fp8", drawn), theirs.dequantize())


def test_nf4_takes_the_nearest_of_its_sixteen_values() -> None:
    drawn = weight((128, 96))
    blocks, values = drawn.view(-1, NF4_BLOCK), get_4bit_type("nf4", device="cpu")
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = values[(blocks / scale).unsqueeze(-1).sub(values).abs().argmin(-1)]
    found = round_trip("nf4", drawn).view(-1, NF4_BLOCK) / scale
    # But for the scales, which are rounded to a byte.
    torch.testing.assert_close(found, nearest, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_library_that_is_missing_is_named_with_what_to_do(
    kind: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in list(sys.modules):
        if name.startswith("atelier_runtime.quantization.") and name.endswith((".rows", f".{kind}")):
            monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == LIBRARIES[kind]] or [LIBRARIES[kind]]:
        monkeypatch.setitem(sys.modules, name, None)
    wanted = rf"spec\.model\.quantization is '{kind}', which needs {LIBRARIES[kind]}.*atelier-training\[quantization\]"
    with pytest.raises(ConfigError, match=wanted):
        load_format(kind)
