"""Targets against real denoisers: presets, expressions, dead layers and typos."""

from functools import cache

import pytest
from torch import nn

from atelier_api.errors import ConfigError
from atelier_runtime.adapters import resolve_targets
from atelier_runtime.families import FAMILIES, get_family
from family_models import tiny_pipeline


@cache
def denoiser(name: str) -> nn.Module:
    model: nn.Module = getattr(tiny_pipeline(name), get_family(name).denoisers[0])
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["attention", "mlp", "all"])
def test_every_suffix_of_every_preset_names_linear_layers(name: str, preset: str) -> None:
    model, family = denoiser(name), get_family(name)
    resolved = resolve_targets(model, [preset], family)
    for module in map(model.get_submodule, resolved):
        assert isinstance(module, nn.Linear) or (set(module.kernel_size), module.groups) == ({1}, 1)
    unused = [
        suffix for suffix in family.lora_targets[preset] if not any(module.endswith(suffix) for module in resolved)
    ]
    assert unused == []


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_mlp_have_nothing_in_common_and_are_in_all(name: str) -> None:
    model, family = denoiser(name), get_family(name)
    attention, mlp, everything = (
        set(resolve_targets(model, [preset], family)) for preset in ("attention", "mlp", "all")
    )
    assert not attention & mlp
    assert attention | mlp <= everything


def test_an_expression_has_to_match_the_whole_name() -> None:
    model, family = denoiser("wan"), get_family("wan")
    assert resolve_targets(model, [r"blocks\.1\.attn[12]\.to_q"], family) == [
        "blocks.1.attn1.to_q",
        "blocks.1.attn2.to_q",
    ]
    assert resolve_targets(model, [r"proj_out", r"blocks\.0\.attn1\.to_k"], family) == [
        "blocks.0.attn1.to_k",
        "proj_out",
    ]
    with pytest.raises(ConfigError):
        resolve_targets(model, ["attn1"], family)


def test_a_target_without_a_match_names_the_nearest_modules() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'to_q': no linear layer .* blocks\.\*\.attn1\.to_q, blocks\.\*\.attn2\.to_q.*attention, mlp, all",
    ):
        resolve_targets(denoiser("wan"), ["to_q"], get_family("wan"))


def test_a_typo_beside_a_good_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spec\.adapter\.targets has 'atention'"):
        resolve_targets(denoiser("wan"), ["mlp", "atention"], get_family("wan"))


def test_a_broken_expression_is_refused_with_its_error() -> None:
    with pytest.raises(ConfigError, match=r"no regular expression .*unterminated"):
        resolve_targets(denoiser("wan"), ["blocks.(0"], get_family("wan"))


def test_convolutions_and_norms_are_no_targets() -> None:
    with pytest.raises(ConfigError, match="patch_embedding"):
        resolve_targets(denoiser("wan"), ["patch_embedding"], get_family("wan"))


def test_a_layer_whose_output_is_thrown_away_is_left_out_and_alone_refused() -> None:
    model, family = denoiser("sd3"), get_family("sd3")
    dead = family.dead_modules(model)[0]
    assert isinstance(model.get_submodule(dead), nn.Linear)
    assert dead not in resolve_targets(model, ["all"], family)
    with pytest.raises(ConfigError, match=f"it matches only {dead}"):
        resolve_targets(model, [dead.replace(".", r"\.")], family)


def test_a_convolution_is_a_target_only_where_it_is_linear_in_each_pixel_alone() -> None:
    layers = nn.ModuleDict(
        {
            "pointwise": nn.Conv2d(4, 8, 1),
            "grouped": nn.Conv2d(4, 8, 1, groups=4),
            "patches": nn.Conv2d(4, 8, 2, stride=2),
            "depth_wise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        }
    )
    assert resolve_targets(layers, [".*"], get_family("wan")) == ["pointwise"]
