"""Every family with its base in every kind: what is quantised, and that adapters train on it as on plain weights of those values.

A few families of different structure in each run of the tests, all of them in the sweep.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.families import FAMILIES
from atelier_api.quantizations import QUANTIZATIONS, Quantization
from atelier_api.v1alpha1.adapter import Adapter, BoftAdapter, LohaAdapter, LokrAdapter, LoraAdapter
from atelier_runtime.adapters import install, trainable
from atelier_runtime.family import Conditions
from atelier_runtime.quantization import quantize
from family_cases import CASES, PROMPTS, Case, make_case
from family_models import FAMILY_OF
from quantized import CPU, distance, gradients, quantized, quantized_modules, quantized_names, unpacked

FEW = ("flux", "sdxl", "wan", "hidream")
"""Two kinds of transformer blocks, a UNet, a video transformer that keeps layers in fp32, routed experts."""
LORA = LoraAdapter(rank=4, targets=["all"])
BESIDE: dict[str, Adapter] = {"lora": LORA, "lokr": LokrAdapter(type="lokr", factor=4, targets=["all"])}
"""What is added to the output of a layer."""
REBUILDING: dict[str, Adapter] = {
    "dora": LoraAdapter(rank=4, targets=["all"], dora=True),
    "loha": LohaAdapter(type="loha", rank=4, dora=True, targets=["all"]),
    "boft": BoftAdapter(type="boft", block_size=16, targets=["all"]),
}
QUANTISED = [name for name in CASES if FAMILIES[FAMILY_OF[name]].quantizations]
NEAR: dict[Quantization, float] = {"int8": 0.01, "fp8": 0.05, "nf4": 0.2}
"""How far a prediction of a tiny denoiser may move, as a fraction of it. One layer's bound is in test_formats."""


@dataclass(frozen=True)
class Ready:
    """A tiny pipeline with inputs for its denoiser of high noise."""

    case: Case
    noisy: Tensor
    time: Tensor
    conditions: Conditions

    @property
    def denoiser(self) -> nn.Module:
        return self.case.denoiser_at(0.95)

    def predict(self, model: nn.Module) -> Tensor:
        return self.case.family.predict(model, self.noisy, self.time, self.conditions)

    def prediction(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.predict(model)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in FEW else pytest.mark.sweep) for name in QUANTISED]
)
def ready(request: pytest.FixtureRequest) -> Ready:
    return made_ready(request.param)


def made_ready(name: str) -> Ready:
    case = make_case(name)
    noisy, time, _ = case.noised(case.latents(2), (0.95, 0.95))
    return Ready(case, noisy, time, case.conditions(PROMPTS))


def parameters(model: nn.Module, without: set[str]) -> dict[str, Tensor]:
    """Parameters and buffers, but for those of the layers `without`."""
    return {name: p for name, p in model.state_dict().items() if name.rpartition(".")[0] not in without}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_linear_layers_of_the_blocks_are_quantised_and_nothing_else_is_changed(
    ready: Ready, kind: Quantization
) -> None:
    family, plain = ready.case.family, ready.denoiser
    names, model = quantized_names(plain, family), quantized(plain, kind, family)
    assert quantized_modules(model).keys() == names
    assert all(name.startswith(tuple(f"{part.attribute}." for part in family.blocks)) for name in names)
    kept_in_fp32 = set(getattr(plain, "_keep_in_fp32_modules", None) or ())
    assert not any(kept_in_fp32 & set(name.split(".")) for name in names)
    before, after = parameters(plain, names), parameters(model, names)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.dtype == plain.dtype


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_prediction_is_that_of_the_unpacked_weights_and_near_that_of_the_whole_ones(
    ready: Ready, kind: Quantization
) -> None:
    model = quantized(ready.denoiser, kind, ready.case.family)
    found, whole = ready.prediction(model), ready.prediction(ready.denoiser)
    torch.testing.assert_close(found, ready.prediction(unpacked(ready.denoiser, model)), atol=1e-6, rtol=1e-5)
    assert 0 < distance(found, whole) < NEAR[kind]


@pytest.mark.parametrize("adapter", BESIDE)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_gradients_reach_the_adapter_alone_and_are_those_on_the_unpacked_weights(
    ready: Ready, kind: Quantization, adapter: str
) -> None:
    compare_gradients(ready, kind, BESIDE[adapter])


@pytest.mark.parametrize("adapter", REBUILDING)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_adapters_that_compute_the_changed_weight_are_given_the_unpacked_one(kind: Quantization, adapter: str) -> None:
    compare_gradients(made_ready("wan"), kind, REBUILDING[adapter])


def compare_gradients(ready: Ready, kind: Quantization, adapter: Adapter) -> None:
    family, model = ready.case.family, quantized(ready.denoiser, kind, ready.case.family)
    plain = unpacked(ready.denoiser, model)
    packed = {name: p.clone() for name, p in model.named_parameters() if ".packed_" in name}
    for each in (model, plain):
        torch.manual_seed(2)
        install(each, adapter, family)
        disturb(each)
        ready.predict(each).square().mean().backward()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == trainable(model).keys()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    after = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".packed_" in name}
    assert packed.keys() == after.keys()
    assert all(torch.equal(after[name], before) for name, before in packed.items())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_recomputing_activations_changes_no_gradient(ready: Ready, kind: Quantization) -> None:
    model: Any = quantized(ready.denoiser, kind, ready.case.family)
    install(model, LORA, ready.case.family)
    disturb(model)
    ready.predict(model).square().mean().backward()
    kept = gradients(model)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    ready.predict(model).square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, kept[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_it_trains_in_bf16(ready: Ready, kind: Quantization) -> None:
    model = quantized(copy.deepcopy(ready.denoiser).to(torch.bfloat16), kind, ready.case.family)
    install(model, LORA, ready.case.family)
    disturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ready.predict(model).float().square().mean()
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert gradients(model).keys() == trainable(model).keys()


def disturb(model: nn.Module) -> None:
    """Draw new adapter weights, so that the adapter does something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_the_report_counts_the_parameters_that_packed_weights_stand_for(ready: Ready) -> None:
    family = ready.case.family
    reports = [install(model, LORA, family) for model in (
        copy.deepcopy(ready.denoiser), quantize(copy.deepcopy(ready.denoiser), "nf4", family, CPU)
    )]  # fmt: skip
    assert reports[0] == reports[1]
