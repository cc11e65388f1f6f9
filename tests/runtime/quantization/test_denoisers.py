"""Every family with a quantised base: what is quantised, and that adapters train on it as on plain weights of those values.

A LoRA's gradients with every kind; else a few families of different structure with every kind, and the others in the sweep with the
kind that moves weights most.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.families import FAMILIES
from atelier_api.quantizations import QUANTIZATIONS, Quantization
from atelier_api.v1alpha1.adapter import (
    Adapter,
    BoftAdapter,
    DiagOftAdapter,
    DyloraAdapter,
    Ia3Adapter,
    LoconAdapter,
    LohaAdapter,
    LokrAdapter,
    LoraAdapter,
)
from atelier_runtime.adapters import install, trainable
from atelier_runtime.family import Conditions
from family_cases import CASES, PROMPTS, Case
from family_models import FAMILY_OF
from quantized import (
    EVERY_PAIR,
    FEW,
    NEAR,
    distance,
    gradients,
    quantized,
    quantized_modules,
    quantized_names,
    unpacked,
)
from shared_cases import shared_case

LORA = LoraAdapter(rank=4, targets=["all"])
OTHERS: dict[str, Adapter] = {
    "lokr": LokrAdapter(type="lokr", factor=4, targets=["all"]),
    "dora": LoraAdapter(rank=4, targets=["all"], dora=True),
    "locon": LoconAdapter(type="locon", rank=4, targets=["all"]),
    "loha": LohaAdapter(type="loha", rank=4, dora=True, targets=["all"]),
    "diag-oft": DiagOftAdapter(type="diag-oft", block_size=16, targets=["all"]),
    "boft": BoftAdapter(type="boft", block_size=16, targets=["all"]),
    "dylora": DyloraAdapter(type="dylora", rank=4, rank_block=2, targets=["all"]),
    "ia3": Ia3Adapter(type="ia3", targets=["all"], input_targets=["mlp"]),
}
"""Some are added to the output of a layer, some compute the changed weight (with DoRA, of rotations)."""
PAIRS = [
    pytest.param((name, kind), marks=[] if name in FEW else pytest.mark.sweep, id=f"{name}-{kind}")
    for name in CASES
    for kind in FAMILIES[FAMILY_OF[name]].quantizations
    if name in FEW or kind == "nf4"
]


@dataclass(frozen=True)
class Ready:
    """A tiny pipeline with inputs for its denoiser of high noise, and the kind that this one is to be kept in."""

    case: Case
    kind: Quantization
    noisy: Tensor
    time: Tensor
    conditions: Conditions

    @property
    def denoiser(self) -> nn.Module:
        return self.case.denoiser_at(0.95)

    def quantized(self) -> Any:
        """A quantised copy of the denoiser."""
        return quantized(self.denoiser, self.kind, self.case.family)

    def predict(self, model: nn.Module) -> Tensor:
        return self.case.family.predict(model, self.noisy, self.time, self.conditions)

    def prediction(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.predict(model)


@pytest.fixture(scope="module", params=PAIRS)
def ready(request: pytest.FixtureRequest) -> Ready:
    return made_ready(*request.param)


def made_ready(name: str, kind: Quantization) -> Ready:
    case = tiny_case(name)
    noisy, time, _ = case.noised(case.latents(2), (0.95, 0.95))
    return Ready(case, kind, noisy, time, case.conditions(PROMPTS))


@lru_cache(maxsize=1)  # the kinds of a family come one after another
def tiny_case(name: str) -> Case:
    return shared_case(name)


def parameters(model: nn.Module, without: set[str]) -> dict[str, Tensor]:
    """Parameters and buffers, but for those of the layers `without`."""
    return {name: p for name, p in model.state_dict().items() if name.rpartition(".")[0] not in without}


def test_linear_layers_of_the_blocks_are_quantised_and_nothing_else_is_changed(ready: Ready) -> None:
    family, plain = ready.case.family, ready.denoiser
    names, model = quantized_names(plain, family), ready.quantized()
    assert quantized_modules(model).keys() == names
    assert all(name.startswith(tuple(f"{part.attribute}." for part in family.blocks)) for name in names)
    kept_in_fp32 = set(getattr(plain, "_keep_in_fp32_modules", None) or ())
    assert not any(kept_in_fp32 & set(name.split(".")) for name in names)
    before, after = parameters(plain, names), parameters(model, names)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.dtype == plain.dtype


@pytest.mark.cell("quantized")
def test_the_prediction_is_that_of_the_unpacked_weights_and_near_that_of_the_whole_ones(ready: Ready) -> None:
    model = ready.quantized()
    found, whole = ready.prediction(model), ready.prediction(ready.denoiser)
    torch.testing.assert_close(found, ready.prediction(unpacked(ready.denoiser, model)), atol=1e-6, rtol=1e-5)
    assert 0 < distance(found, whole) < NEAR[ready.kind]


@pytest.mark.cell("quantized")
@pytest.mark.parametrize("pair", EVERY_PAIR)
def test_gradients_reach_the_adapter_alone_and_are_those_on_the_unpacked_weights(
    pair: tuple[str, Quantization],
) -> None:
    compare_gradients(made_ready(*pair), LORA)


@pytest.mark.parametrize("adapter", OTHERS)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_other_adapters_add_to_its_output_or_are_given_the_unpacked_weight(kind: Quantization, adapter: str) -> None:
    compare_gradients(made_ready("wan", kind), OTHERS[adapter])


def compare_gradients(ready: Ready, adapter: Adapter) -> None:
    family, model = ready.case.family, ready.quantized()
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


def test_recomputing_activations_changes_no_gradient(ready: Ready) -> None:
    model = ready.quantized()
    install(model, LORA, ready.case.family)
    disturb(model)
    ready.predict(model).square().mean().backward()
    kept = gradients(model)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    ready.predict(model).square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, kept[name], atol=1e-6, rtol=1e-5)


@pytest.mark.cell("quantized")
def test_it_trains_in_bf16(ready: Ready) -> None:
    model = quantized(copy.deepcopy(ready.denoiser).to(torch.bfloat16), ready.kind, ready.case.family)
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
    plain, packed = (install(model, LORA, family) for model in (copy.deepcopy(ready.denoiser), ready.quantized()))
    assert plain == packed
