"""Densities, shifts and ranges of sigma against closed forms and against diffusers' own scheduler."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.objective import Objective, Timesteps
from atelier_runtime.family import Stage
from atelier_runtime.objectives.flow import FlowObjective
from atelier_runtime.objectives.timesteps import (
    Beta,
    ConstantShift,
    DynamicShift,
    LogitNormal,
    Uniform,
    build_density,
    draw_sigma,
    range_probabilities,
    resolve_shift,
    shift_sigma,
)

WHOLE = Stage("transformer")
DENSITIES = {
    "uniform": Uniform(),
    "logit-normal": LogitNormal(0.0, 1.0),
    "logit-normal narrow": LogitNormal(-1.5, 0.6),
    "beta": Beta(2.0, 2.0),
    "beta with poles": Beta(0.5, 0.5),
}
shifts = st.floats(0.05, 20)
sigmas = st.floats(1e-6, 1.0)


@given(sigmas, shifts, shifts)
@settings(max_examples=50, deadline=None)
def test_two_shifts_in_a_row_are_the_shift_by_the_product(sigma: float, k: float, j: float) -> None:
    assert shift_sigma(shift_sigma(sigma, j), k) == pytest.approx(shift_sigma(sigma, k * j), rel=1e-12)


@given(st.floats(0.001, 0.999), shifts, st.floats(-2, 2), st.floats(0.2, 3))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_a_logit_normal_density_is_a_mean_moved_by_ln_k(
    probability: float, k: float, mean: float, scale: float
) -> None:
    shifted = shift_sigma(LogitNormal(mean, scale).quantile(probability), k)
    assert shifted == pytest.approx(LogitNormal(mean + math.log(k), scale).quantile(probability), rel=1e-9)


@pytest.mark.parametrize("mu", [-0.5, 0.5, 1.15, 2.0])
def test_the_dynamic_shift_is_the_time_shift_of_the_sampling_scheduler(mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    times = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    ours = [shift_sigma(float(time), math.exp(mu)) for time in times]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), scheduler.time_shift(mu, 1.0, times))


def test_the_linear_dynamic_shift_is_the_time_shift_of_the_sampling_scheduler() -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    k = resolve_shift("auto", config, 1.0).factor(1000)
    times = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    ours = torch.tensor([shift_sigma(float(time), k) for time in times], dtype=torch.float64)
    torch.testing.assert_close(ours, scheduler.time_shift(k, 1.0, times))


def test_a_static_shift_is_the_one_of_the_sampling_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = [shift_sigma(float(step) / 1000, 3.0) for step in range(1000, 0, -1)]
    torch.testing.assert_close(torch.tensor(ours), scheduler.sigmas[: len(ours)].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_the_dynamic_shift_is_linear_in_tokens_through_its_two_points(tokens: int, mu: float) -> None:
    assert DynamicShift().factor(tokens) == pytest.approx(math.exp(mu))


CHECKPOINT_DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift": 1.0,
}


@pytest.mark.parametrize(
    ("user", "config", "family", "expected"),
    [
        pytest.param("4.5", {"shift": 3.0}, 6.0, ConstantShift(4.5), id="the user's number wins"),
        pytest.param("none", CHECKPOINT_DYNAMIC, 6.0, ConstantShift(1.0), id="none is 1"),
        pytest.param("auto", {"shift": 3.0}, 6.0, ConstantShift(3.0), id="FlowMatchEuler names it shift"),
        pytest.param("auto", {"flow_shift": 5.0}, 6.0, ConstantShift(5.0), id="UniPC and DPM name it flow_shift"),
        pytest.param(
            "auto", CHECKPOINT_DYNAMIC, 6.0, DynamicShift(0.5, 0.9, 256, 8192), id="dynamic beats the static number"
        ),
        pytest.param(
            "auto", {"use_dynamic_shifting": False, "shift": 2.0}, 6.0, ConstantShift(2.0), id="dynamic switched off"
        ),
        pytest.param("auto", {}, 6.0, ConstantShift(6.0), id="the family's number"),
        pytest.param("auto", {}, "none", ConstantShift(1.0), id="the family has none"),
        pytest.param("auto", {}, "dynamic", DynamicShift(), id="the family is dynamic"),
        pytest.param("dynamic", {"shift": 3.0}, 6.0, DynamicShift(), id="dynamic asked for"),
        pytest.param(
            "dynamic", {**CHECKPOINT_DYNAMIC, "use_dynamic_shifting": False}, 6.0,
            DynamicShift(0.5, 0.9, 256, 8192), id="dynamic asked for takes the checkpoint's points",
        ),
    ],
)  # fmt: skip
def test_the_shift_comes_from_the_user_then_the_checkpoint_then_the_family(user, config, family, expected) -> None:  # type: ignore[no-untyped-def]
    assert resolve_shift(user, config, family) == expected


@pytest.mark.parametrize(
    ("user", "config", "names"),
    [
        ("0", {}, "spec.objective.timesteps.shift is 0"),
        ("auto", {"shift": 0.0}, "shift of the checkpoint's scheduler is 0"),
        (
            "auto",
            {**CHECKPOINT_DYNAMIC, "max_image_seq_len": 256},
            "base_image_seq_len of the checkpoint's scheduler is 256",
        ),
    ],
)
def test_an_impossible_shift_is_refused_by_name(user: str, config: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        resolve_shift(user, config, 1.0)


@pytest.mark.parametrize(
    ("density", "cdf"),
    [
        pytest.param(Beta(2, 2), lambda s: 3 * s**2 - 2 * s**3, id="2,2"),
        pytest.param(Beta(5, 1), lambda s: s**5, id="5,1"),
        pytest.param(Beta(1, 7), lambda s: 1 - (1 - s) ** 7, id="1,7"),
        pytest.param(Beta(0.5, 0.5), lambda s: 2 / math.pi * math.asin(math.sqrt(s)), id="arcsine"),
        pytest.param(Beta(0.05, 1), lambda s: s**0.05, id="strong pole"),
        pytest.param(Beta(100, 1), lambda s: s**100, id="strong peak"),
    ],
)
def test_the_beta_density_has_its_closed_form_cdf(density: Beta, cdf) -> None:  # type: ignore[no-untyped-def]
    for sigma in (0.001, 0.1, 0.37, 0.5, 0.83, 0.999):
        assert density.cdf(sigma) == pytest.approx(cdf(sigma), abs=2e-5)
    assert (density.cdf(0), density.cdf(1)) == (0, 1)


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
def test_the_quantile_inverts_the_cdf(density) -> None:  # type: ignore[no-untyped-def]
    for probability in (1e-6, 0.01, 0.3, 0.5, 0.77, 0.999):
        assert density.cdf(density.quantile(probability)) == pytest.approx(probability, rel=1e-9)


def test_each_sampling_of_the_api_builds_its_density() -> None:
    assert build_density(Timesteps(sampling="uniform")) == Uniform()
    assert build_density(Timesteps(logit_mean=0.5, logit_scale=2.0)) == LogitNormal(0.5, 2.0)
    assert build_density(Timesteps(sampling="beta", beta_a=3.0, beta_b=4.0)) == Beta(3.0, 4.0)


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize(
    "stage", [WHOLE, Stage("high", 0.875, 1.0), Stage("low", 0.0, 0.875)], ids=lambda s: s.denoiser
)
def test_inside_a_range_the_histogram_is_the_density_cut_to_it(density, stage: Stage) -> None:  # type: ignore[no-untyped-def]
    k, draws, bins = 3.0, 3000, 8
    generator = torch.Generator().manual_seed(7)
    values = torch.tensor([draw_sigma(density, k, stage, generator) for _ in range(draws)], dtype=torch.float64)
    assert values.min() >= stage.low
    assert values.min() > 0
    assert values.max() <= stage.high
    edges = torch.linspace(stage.low, stage.high, bins + 1, dtype=torch.float64)
    counts = torch.histogram(values, edges).hist / draws
    whole = [range_probabilities(density, k, Stage("", float(a), float(b))) for a, b in pairwise(edges)]
    expected = torch.tensor([up_to - below for below, up_to in whole], dtype=torch.float64)
    torch.testing.assert_close(counts, expected / expected.sum(), rtol=0, atol=0.035)


def test_truncation_does_not_pile_up_on_the_ends_as_clamping_would() -> None:
    stage, generator = Stage("high", 0.9, 1.0), torch.Generator().manual_seed(3)
    values = [draw_sigma(LogitNormal(0, 1), 1.0, stage, generator) for _ in range(500)]
    assert sum(value == stage.low for value in values) == 0


def test_a_range_without_mass_is_refused_by_its_denoiser_and_range() -> None:
    with pytest.raises(ConfigError, match=r"draws no sigma in the range that is trained \(transformer 0.9 to 1\)"):
        draw_sigma(LogitNormal(-10, 0.1), 1.0, Stage("transformer", 0.9, 1.0), torch.Generator())


STAGES = (Stage("transformer", 0.875, 1.0), Stage("transformer_2", 0.0, 0.875))


def test_a_stage_is_picked_in_proportion_to_the_shifted_mass_of_its_range() -> None:
    objective = FlowObjective(Objective(), ConstantShift(3.0))
    generator = torch.Generator().manual_seed(1)
    picks = [objective.pick_stage(STAGES, generator, tokens=100).denoiser for _ in range(3000)]
    boundary = 0.875 / (0.875 + 3 * 0.125)  # the inverse shift of 0.875
    high = 1 - LogitNormal(0, 1).cdf(boundary)
    assert objective.mass(STAGES[0], 100) == pytest.approx(high)
    assert picks.count("transformer") / 3000 == pytest.approx(high, abs=0.03)


def test_a_single_stage_is_picked_without_a_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert FlowObjective(Objective(), ConstantShift(1.0)).pick_stage(STAGES[:1], generator, tokens=1) is STAGES[0]
    assert torch.equal(before, generator.get_state())


def test_stages_without_any_mass_are_refused() -> None:
    spec = Objective(timesteps=Timesteps(logit_mean=-10, logit_scale=0.01))
    stages = (Stage("a", 0.9, 0.95), Stage("b", 0.95, 1.0))
    with pytest.raises(ConfigError, match=r"a 0.9 to 0.95, b 0.95 to 1"):
        FlowObjective(spec, ConstantShift(1.0)).pick_stage(stages, torch.Generator(), tokens=1)
