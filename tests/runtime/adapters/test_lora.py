"""LoRA on every family's real denoiser: nothing changes at the start, only the adapter trains, and the maths is what was asked for."""

import copy
import math
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from adapter_runs import FamilyCase, family_case, trained
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_runtime.adapters import install, trainable
from atelier_runtime.families import FAMILIES

pytestmark = pytest.mark.sweep

TARGET = r"blocks\.0\.attn1\.to_q"


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return family_case(request.param)


@pytest.mark.parametrize(
    "options", [{"init": "default"}, {"init": "gaussian"}, {"dora": True}, {"rslora": True}], ids=str
)
def test_the_output_does_not_change_at_the_start(case: FamilyCase, options: dict[str, Any]) -> None:
    model = case.denoiser()
    base = case.predict(model)
    install(model, LoraAdapter(rank=4, targets=["all"], **options), case.family)
    torch.testing.assert_close(case.predict(model), base, atol=1e-5, rtol=1e-5)


def test_only_adapter_parameters_train_and_all_of_them_get_a_gradient(case: FamilyCase) -> None:
    model = case.denoiser()
    before = copy.deepcopy(model.state_dict())
    install(model, LoraAdapter(rank=4, targets=["all"]), case.family)
    parameters = trained(model)
    assert parameters
    assert all(".lora_" in name for name in parameters)

    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    case.predict(model, grad=True).square().sum().backward()
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []
    optimizer.step()
    base = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    assert base.keys() == before.keys()
    assert [name for name, value in base.items() if not torch.equal(value, before[name])] == []


def test_merged_is_unmerged(case: FamilyCase) -> None:
    model = case.denoiser()
    install(model, LoraAdapter(rank=4, alpha=2, targets=["all"]), case.family)
    base = case.predict(model)
    case.disturb(model)
    changed = case.predict(model)
    assert (changed - base).abs().max() > 1e-3
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    torch.testing.assert_close(case.predict(model), changed, atol=1e-4, rtol=1e-4)


def test_the_report_counts_parameters_and_modules_of_what_is_there(case: FamilyCase) -> None:
    model = case.denoiser()
    report = install(model, LoraAdapter(rank=4, targets=["attention"]), case.family)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert sum(report.modules.values()) == len(layers)
    assert report.trainable == sum(parameter.numel() for parameter in trainable(model).values())
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    assert len(report.modules) < 40


def one_layer(**options: Any) -> tuple[Any, Tensor, Tensor]:
    """The layer that LoRA was put on, with a second matrix that is not zero, its input, and the base layer's output."""
    model = family_case("wan").denoiser()
    torch.manual_seed(1)
    install(model, LoraAdapter(rank=4, targets=[TARGET], **options), family_case("wan").family)
    layer: Any = model.get_submodule("blocks.0.attn1.to_q")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    inputs = torch.randn(3, 32)
    return layer, inputs, layer.base_layer(inputs)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 8}, 2.0),
        ({"alpha": 1}, 0.25),
        ({"alpha": 8, "rslora": True}, 8 / math.sqrt(4)),
        ({"rslora": True}, 4 / math.sqrt(4)),
    ],
    ids=["alpha is the rank", "above the rank", "below the rank", "rank-stabilised", "rank-stabilised default"],
)
@torch.no_grad()
def test_the_update_is_scaled_by_alpha_and_rank(options: dict[str, Any], scale: float) -> None:
    layer, inputs, base = one_layer(**options)
    update = inputs @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(inputs), base + scale * update)


@torch.no_grad()
def test_dora_gives_the_sum_the_column_norms_of_its_magnitude() -> None:
    layer, inputs, _ = one_layer(dora=True, alpha=8)
    weight = layer.base_layer.weight
    merged = weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, weight.norm(dim=1))
    expected = inputs @ (magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)).T + layer.base_layer.bias
    torch.testing.assert_close(layer(inputs), expected)


@torch.no_grad()
def test_start_values_are_kaiming_uniform_or_gaussian_by_rank() -> None:
    uniform, _, _ = one_layer()
    bound = 1 / math.sqrt(32)
    assert uniform.lora_A["default"].weight.abs().max() <= bound
    model = family_case("wan").denoiser()
    torch.manual_seed(1)
    install(model, LoraAdapter(rank=16, init="gaussian", targets=["all"]), family_case("wan").family)
    draws = torch.cat([p.flatten() for name, p in trainable(model).items() if ".lora_A." in name])
    assert draws.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_dropout_works_while_training_and_not_while_sampling() -> None:
    layer, inputs, base = one_layer(dropout=0.5)
    assert not torch.equal(layer(inputs), layer(inputs))
    layer.eval()
    assert torch.equal(layer(inputs), layer(inputs))
    assert not torch.equal(layer(inputs), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_weights_have_the_asked_dtype_and_the_base_keeps_its_own(dtype: torch.dtype) -> None:
    case = family_case("wan")
    model = case.denoiser().to(torch.bfloat16)
    install(model, LoraAdapter(rank=2, dora=True), case.family, dtype=dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {dtype}
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
