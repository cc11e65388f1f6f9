"""Adapters at a strength: 0 is the base, -k is a network of that scale, and outside everything is as it was."""

from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from adapter_runs import FamilyCase, family_case
from atelier_api.v1alpha1.adapter import Adapter, FullAdapter, LoraAdapter, has_strength
from atelier_runtime.adapters import at_strength, install, resolve_targets, trainable
from atelier_runtime.adapters.lora import ADAPTER_NAME, lora_config
from atelier_runtime.lycoris_layout import file_tensors, layer_name
from atelier_runtime.module_names import matching_expression
from lycoris_adapters import OPTIONS, lycoris_adapter, stock_modules

K = 1.5
LORAS = {"lora": {}, "lora with alpha": {"alpha": 7}, "lora rank-stabilised": {"rslora": True}}
LYCORIS = [name for name in OPTIONS if has_strength(lycoris_adapter(name))]
ALL = [*LORAS, *LYCORIS]


@pytest.fixture(scope="module", params=["sdxl", "sana"])
def case(request: pytest.FixtureRequest) -> FamilyCase:
    """A UNet, and a transformer whose feed-forward layers are convolutions."""
    return family_case(request.param)


def adapter_of(name: str) -> Any:
    if name in LORAS:
        return LoraAdapter(rank=4, targets=["all"], **LORAS[name])
    # Where alpha is the rank the file has what is trained, and not a multiple of it.
    return lycoris_adapter(name, **({"alpha": OPTIONS[name]["rank"]} if "rank" in OPTIONS[name] else {}))


def installed(case: FamilyCase, adapter: Adapter) -> Any:
    model = case.denoiser()
    install(model, adapter, case.family)
    case.disturb(model)
    return model.eval()  # a DyLoRA with all its ranks, as its file has them


def result(case: FamilyCase, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction and the gradients of a loss of it by the names of the parameters that are trained."""
    model.zero_grad()
    prediction = case.predict(model, grad=True)
    prediction.square().sum().backward()
    return prediction.detach(), {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize("name", ALL)
def test_at_strength_0_the_base_is_left_and_the_adapter_gets_no_gradient(case: FamilyCase, name: str) -> None:
    model = installed(case, adapter_of(name))
    with at_strength([model], 0.0):
        prediction, gradients = result(case, model)
    torch.testing.assert_close(prediction, case.predict(case.denoiser()), atol=1e-6, rtol=1e-6)
    assert gradients.keys() == trainable(model).keys()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_at_strength_minus_k_is_one_whose_alpha_is_minus_k_times_as_large(case: FamilyCase, name: str) -> None:
    adapter = adapter_of(name)
    model, other = installed(case, adapter), case.denoiser()
    config = lora_config(adapter, matching_expression(resolve_targets(other, adapter.targets, case.family)))
    config.lora_alpha = -K * config.lora_alpha  # type: ignore[assignment]
    inject_adapter_in_model(config, other, adapter_name=ADAPTER_NAME)
    other.load_state_dict(model.state_dict())
    expected, expected_gradients = result(case, other)
    with at_strength([model], -K):
        prediction, gradients = result(case, model)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() <= expected_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", LYCORIS)
def test_a_module_at_strength_minus_k_is_the_librarys_own_of_multiplier_minus_k(case: FamilyCase, name: str) -> None:
    """The file, put on a model that knows nothing of ours; the library computes the changed weights there."""
    adapter = adapter_of(name)
    model, other = installed(case, adapter), case.denoiser()
    weights = {key: parameter.detach().clone() for key, parameter in trainable(model).items()}
    other.requires_grad_(False)
    modules = stock_modules(other, file_tensors(weights, adapter, case.family))
    for module in modules:
        module.multiplier = -K
        module.apply_to()
    expected = case.predict(other, grad=True)
    expected.square().sum().backward()
    with at_strength([model], -K):
        prediction, gradients = result(case, model)
    torch.testing.assert_close(prediction, expected.detach(), atol=1e-4, rtol=1e-4)
    theirs = {f"{module.lora_name}.{key}": p.grad for module in modules for key, p in module.named_parameters()}
    for key, gradient in gradients.items():
        layer, _, tensor = key.partition(".lycoris.")
        found = theirs[f"{layer_name(layer)}.{tensor}"]
        scale = float(found.abs().max())
        torch.testing.assert_close(gradient / scale, found / scale, atol=1e-3, rtol=1e-3, msg=key)


def fail_at(strength: float, case: FamilyCase, model: nn.Module) -> None:
    with at_strength([model], strength):
        case.predict(model)
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("name", ["lora", "lokr", "boft"])
def test_afterwards_the_adapter_is_as_it_was_also_after_an_exception(case: FamilyCase, name: str) -> None:
    model = installed(case, adapter_of(name))
    before, before_gradients = result(case, model)
    for strength in (-K, 0.0):
        with pytest.raises(RuntimeError, match="in the middle"):
            fail_at(strength, case, model)
        after, after_gradients = result(case, model)
        assert torch.equal(after, before)
        assert all(torch.equal(after_gradients[key], gradient) for key, gradient in before_gradients.items())


def test_at_strength_1_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no slider trains as if there were none: no layer is even looked at."""
    model = installed(family_case("sana"), adapter_of("lora"))
    monkeypatch.setattr(model, "named_modules", lambda: pytest.fail("the layers were looked at"))
    with at_strength([model], 1.0):
        pass


@pytest.mark.parametrize("name", [name for name in ALL if name != "boft"])
def test_strengths_s_and_minus_s_change_the_weight_by_opposite_amounts_and_0_does_not(name: str) -> None:
    """On one layer, and by as many times as the strength says: the docstring's formulas."""
    case = family_case("sana")
    model = installed(case, adapter_of(name))
    layer = adapted_layer(model)
    base = case.denoiser().get_submodule(layer).weight.flatten(1)
    changed = {strength: weight_of(model, layer, strength) - base for strength in (0.0, 1.0, 2.0, -2.0)}
    assert changed[1.0].norm() > 1e-2 * base.norm()
    torch.testing.assert_close(changed[0.0], torch.zeros_like(base), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(changed[2.0], 2 * changed[1.0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(changed[-2.0], -changed[2.0], atol=1e-5, rtol=1e-4)


def test_of_a_butterfly_each_stage_is_pulled(case: FamilyCase) -> None:
    """The one whose update is no multiple: two strengths are opposite in each stage of its product, not in the product."""
    model = installed(case, adapter_of("boft"))
    module = first_module(model)
    layer = adapted_layer(model)
    whole = weight_of(model, layer, 0.0)
    stages = rotations(module, -2.0)
    assert len(stages) > 1
    for stage in stages:
        whole = stage @ whole
    torch.testing.assert_close(weight_of(model, layer, -2.0), whole, atol=1e-4, rtol=1e-4)


def first_module(model: nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(".lycoris"))


def adapted_layer(model: nn.Module) -> str:
    """The first linear layer that has an adapter."""
    names = (name for name, _ in model.named_modules())
    return next(name.rpartition(".")[0] for name in names if name.endswith((".lycoris", ".lora_A")))


@torch.no_grad()
def weight_of(model: nn.Module, layer: str, strength: float) -> Tensor:
    """The weight [outputs, inputs] that a layer multiplies with."""
    linear: Any = model.get_submodule(layer)
    inputs = torch.eye(linear.weight.shape[1])
    with at_strength([model], strength):
        outputs = linear(inputs.view(*inputs.shape, *[1] * (linear.weight.ndim - 2)))
    zero = linear.bias if linear.bias is not None else 0
    return (outputs.flatten(1) - zero).T


@torch.no_grad()
def rotations(module: Any, strength: float) -> list[Tensor]:
    """The stages of a butterfly as matrices [outputs, outputs], each pulled towards the identity (arXiv:2311.06243, section 4)."""
    blocks = module.get_r()
    side, outputs = module.block_size, module.dim
    stages = []
    for number, rotation in enumerate(blocks):
        stride = 2**number * side // 2
        pulled = strength * rotation + (1 - strength) * torch.eye(side)
        order = torch.arange(outputs).view(-1, 2, stride).transpose(1, 2).flatten()
        matrix = torch.zeros(outputs, outputs)
        matrix[order[:, None], order[None, :]] = torch.block_diag(*pulled)
        stages.append(matrix)
    return stages


@pytest.mark.parametrize("name", ["lora", "lokr low-rank", "diag-oft", "boft", "dylora"])
def test_recomputed_activations_have_the_strength_of_the_first_time(name: str) -> None:
    case = family_case("wan")
    model = installed(case, adapter_of(name)).train()
    with at_strength([model], -K):
        _, kept = result(case, model)
        model.enable_gradient_checkpointing()
        _, recomputed = result(case, model)
    _, plain = result(case, model)
    for key, gradient in kept.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-5)
    assert any((plain[key] - gradient).abs().max() > 1e-3 for key, gradient in kept.items())


def test_a_strength_of_what_has_none_is_an_error() -> None:
    model = family_case("sana").denoiser()
    install(model, FullAdapter(type="full"), family_case("sana").family)
    refused = pytest.raises(ValueError, match="a strength of -1 is asked of denoisers without an adapter that has one")
    with refused, at_strength([model], -1.0):
        pass
