"""Full-rank: everything trains but what the family freezes."""

import pytest
import torch

from adapter_runs import FamilyCase, family_case
from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.adapter import FullAdapter
from atelier_runtime.adapters import install, trainable
from atelier_runtime.families import FAMILIES
from atelier_runtime.families.wan import Wan


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_trains_and_gets_a_gradient(name: str) -> None:
    case: FamilyCase = family_case(name)
    model = case.denoiser()
    base = case.predict(model)
    report = install(model, FullAdapter(type="full"), case.family)
    assert model.training
    torch.testing.assert_close(case.predict(model), base)
    case.predict(model, grad=True).square().sum().backward()
    assert [key for key, parameter in trainable(model).items() if parameter.grad is None] == []
    assert report.trainable == sum(parameter.numel() for parameter in trainable(model).values()) > 0
    assert sum(report.modules.values()) == len(trainable(model))


class PartlyFrozenWan(Wan):
    frozen_parameters = (r"blocks\.1\..*", r"proj_out\.bias")


class FrozenWan(Wan):
    frozen_parameters = (r".*",)


def test_parameters_that_the_family_freezes_do_not_train() -> None:
    model = family_case("wan").denoiser()
    report = install(model, FullAdapter(type="full"), PartlyFrozenWan())
    names = set(trainable(model))
    assert "proj_out.weight" in names
    assert "proj_out.bias" not in names
    assert not any(name.startswith("blocks.1.") for name in names)
    assert report.trainable < report.total


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spec\.adapter\.type is 'full', but every parameter"):
        install(family_case("wan").denoiser(), FullAdapter(type="full"), FrozenWan())


def test_weights_keep_the_dtype_they_were_loaded_in() -> None:
    model = family_case("wan").denoiser().to(torch.bfloat16)
    install(model, FullAdapter(type="full"), family_case("wan").family, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_layers_whose_output_is_thrown_away_do_not_train() -> None:
    case = family_case("sd3")
    model = case.denoiser()
    dead = case.family.dead_modules(model)
    install(model, FullAdapter(type="full"), case.family)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{name}.{part}" for name in dead for part in ("weight", "bias")} != set()
