"""A quantised layer multiplies as a plain one with the same weights does, and keeps no more than its packed weight."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_api.quantizations import QUANTIZATIONS, Quantization, packed_bytes
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_runtime import adapters
from atelier_runtime.families import get_family
from atelier_runtime.quantization import FORMATS, QuantizedLinear
from quantized import CPU


def pair(kind: Quantization, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[nn.Linear, Any]:
    """A plain layer, and a quantised one of it."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 32, bias=bias).to(dtype).requires_grad_(False)
    return plain, QuantizedLinear(plain, FORMATS[kind], CPU)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_output_and_gradient_are_those_of_the_unpacked_weight(
    kind: Quantization, dtype: torch.dtype, bias: bool
) -> None:
    _, layer = pair(kind, dtype, bias=bias)
    found, expected = inputs(dtype), inputs(dtype)
    output, plain = layer(found), functional.linear(expected, layer.weight, layer.bias)
    assert torch.equal(output, plain)
    output.float().square().sum().backward()
    plain.float().square().sum().backward()
    assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_under_autocast_the_product_is_that_of_a_plain_layer(kind: Quantization, dtype: torch.dtype) -> None:
    """On a GPU norms hand over fp32: torchao's and bitsandbytes' own layers then give fp32 back, twice the activations."""
    plain, layer = pair(kind, torch.bfloat16)
    plain.weight.data = layer.weight
    found, expected = inputs(dtype), inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        output, reference = layer(found), plain(expected)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, reference)
    output.float().square().sum().backward()
    reference.float().square().sum().backward()
    assert found.grad.dtype == dtype
    assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_backward_pass_is_kept_the_packed_weight_alone(kind: Quantization) -> None:
    """torchao's own layers keep the unpacked weight, so that without recompute nothing would be saved."""
    _, layer = pair(kind, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs(torch.bfloat16))
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == packed_bytes(kind, 32, 48)
    assert {tensor.data_ptr() for tensor in kept} <= {parameter.data_ptr() for parameter in layer.parameters()}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_casting_a_model_leaves_packed_weights_as_they_are(kind: Quantization) -> None:
    _, layer = pair(kind)
    before = layer.weight
    model = nn.Sequential(nn.Linear(2, 48), layer).to(torch.bfloat16)
    assert torch.equal(model[1].weight, before)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(copy.deepcopy(layer).weight, before)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_packing_a_weight_twice_gives_the_same_bits(kind: Quantization) -> None:
    _, first = pair(kind)
    _, second = pair(kind)
    assert {name: p.tolist() for name, p in first.named_parameters()} == {
        name: p.tolist() for name, p in second.named_parameters()
    }


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_putting_a_lora_on_it_unpacks_it_once(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleDict({name: pair("nf4")[1] for name in ("first", "second")})
    asked: list[Any] = []

    def unpacked(layer: QuantizedLinear, packed: Sequence[Tensor]) -> Tensor:
        asked.append(layer)
        return unpack(layer, packed)

    unpack = QuantizedLinear.unpacked
    monkeypatch.setattr(QuantizedLinear, "unpacked", unpacked)
    quantised = list(layers.values())
    adapters.install(layers, LoraAdapter(rank=4, targets=["first", "second"], dora=dora), get_family("flux"))
    assert asked == quantised
    assert quantised[0].weight is not quantised[0].weight  # kept no longer
