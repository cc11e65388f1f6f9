"""Diff2Flow: the loss is that of the velocity, times are drawn as flow matching draws them, and off changes nothing."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.v1alpha1.objective import Diff2Flow, Noise, Objective, Timesteps
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.bridge import FlowTimes, flow_sigma, flow_weight
from atelier_runtime.objectives.noise_schedules import BetaSchedule
from atelier_runtime.objectives.timesteps import LogitNormal, Uniform, draw_sigma
from family_cases import PROMPTS, make_case

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WHOLE = Stage("unet")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "train-by-flow-matching.md"
ON = Diff2Flow()
BRIDGED = [
    name for name, facts in FAMILIES.items() if (facts.objective, facts.noise_schedule) == ("diffusion", "betas")
]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def made(spec: Objective, clean: Tensor, config: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """(objective, prepared)"""
    objective = build_objective(spec, FAMILIES["sdxl"], config or SDXL)
    return objective, objective.prepare(clean, generators(len(clean)), stage=WHOLE, tokens=4)


def velocity(predicted: Tensor, noisy: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """eps' - x0' as the paper has it, from what the network predicts."""
    a, b = (each.view(-1, 1, 1, 1) for each in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    if prediction == "v":
        return (a * predicted + b * noisy) - (a * noisy - b * predicted)
    return predicted - (noisy - b * predicted) / a


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_loss_is_the_squared_error_of_the_velocity(prediction: str) -> None:
    clean = torch.randn(32, 4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective, prepared = made(Objective(prediction=prediction, diff2_flow=ON), clean)
    alpha_bar = objective.schedule.alpha_bar(prepared.time).double()
    a, b = (each.view(-1, 1, 1, 1) for each in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noise = (prepared.noisy.double() - a * clean) / b
    predicted = prepared.target + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    error = velocity(predicted.double(), prepared.noisy.double(), alpha_bar, prediction) - (noise - clean)
    expected = error.square().flatten(1).mean(1)
    torch.testing.assert_close(objective.loss(predicted, prepared).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", BRIDGED)
@torch.no_grad()
def test_the_loss_of_a_network_is_that_of_its_velocity(family: str) -> None:
    case = make_case(family)
    objective: Any = build_objective(Objective(diff2_flow=ON), case.family.facts, case.pipe.scheduler.config)
    clean = case.latents(2)
    prepared = objective.prepare(clean, generators(2), stage=Stage(case.family.denoisers[0]), tokens=4)
    [denoiser] = case.denoisers.values()
    predicted = case.family.predict(denoiser, prepared.noisy, prepared.time, case.conditions(PROMPTS))
    alpha_bar = objective.schedule.alpha_bar(prepared.time)
    noise = torch.stack([_noise_after_the_time(generator, clean) for generator in generators(2)])
    error = velocity(predicted, prepared.noisy, alpha_bar, objective.prediction) - (noise - clean)
    torch.testing.assert_close(
        objective.loss(predicted, prepared), error.square().flatten(1).mean(1), rtol=1e-3, atol=1e-6
    )


def _noise_after_the_time(generator: torch.Generator, clean: Tensor) -> Tensor:
    torch.rand((), generator=generator, dtype=torch.float64)
    return torch.randn(clean.shape[1:], generator=generator)


def test_a_noisy_sample_is_the_point_of_the_straight_path_scaled() -> None:
    clean = torch.randn(8, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    objective, prepared = made(Objective(prediction="epsilon", diff2_flow=ON), clean)
    alpha_bar = objective.schedule.alpha_bar(prepared.time)
    sigma = flow_sigma(alpha_bar).view(-1, 1, 1, 1)
    scale = (alpha_bar.sqrt() + (1 - alpha_bar).sqrt()).view(-1, 1, 1, 1)
    torch.testing.assert_close(prepared.noisy, scale * ((1 - sigma) * clean + sigma * prepared.target))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_step_of_a_flow_sampler_along_the_velocity_is_a_step_of_ddim(prediction: str) -> None:
    """What the loss compares is the velocity that diffusers' Euler sampler of flows takes, of what its DDIM takes for epsilon or v."""
    generator = torch.Generator().manual_seed(4)
    noisy, predicted = (torch.randn(1, 4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    ddim = DDIMScheduler(**SDXL, prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(20)
    steps, levels = ddim.timesteps[5:7], ddim.alphas_cumprod.double()[ddim.timesteps[5:7]]
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=flow_sigma(levels).tolist())
    scale, next_scale = levels.sqrt() + (1 - levels).sqrt()
    along = velocity(predicted, noisy, levels[:1], prediction)
    stepped = euler.step(along, euler.timesteps[0], noisy / scale, return_dict=False)[0]
    expected = ddim.step(predicted, steps[0], noisy, return_dict=False)[0]
    torch.testing.assert_close(stepped * next_scale, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("density", [Uniform(), LogitNormal(0.0, 1.0)], ids=["uniform", "logit-normal"])
def test_a_step_is_the_nearest_to_a_sigma_drawn_as_flow_matching_does(density: Any, shift: float) -> None:
    betas = BetaSchedule(SDXL, zero_terminal_snr=False, prediction="epsilon")
    times, sigmas = FlowTimes(betas, density, shift), flow_sigma(betas.alpha_bars.double())
    for seed in range(300):
        sigma = draw_sigma(density, shift, WHOLE, torch.Generator().manual_seed(seed))
        step = int(times.draw(WHOLE, torch.Generator().manual_seed(seed)))
        assert abs(sigmas[step] - sigma) <= (sigmas - sigma).abs().min() + 1e-7  # a sigma of flow matching is fp32


def test_a_stage_draws_only_its_own_steps() -> None:
    times = FlowTimes(BetaSchedule(SDXL, zero_terminal_snr=False, prediction="epsilon"), Uniform(), 1.0)
    low, high = Stage("a", 0.0, 0.2), Stage("b", 0.2, 1.0)
    assert all(times.draw(low, generator) < 200 for generator in generators(100))
    assert all(times.draw(high, generator) >= 200 for generator in generators(100))
    assert times.mass(low) + times.mass(high) == pytest.approx(1)
    assert times.mass(low) == pytest.approx(float(times.probabilities[:200].sum()))
    with pytest.raises(ConfigError, match=r"a 0\.5 to 0\.5"):
        times.draw(Stage("a", 0.5, 0.5), torch.Generator())


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=3))
@settings(max_examples=10, deadline=None)
def test_a_sample_draws_the_same_alone_and_in_a_batch(seeds: Sequence[int]) -> None:
    objective = build_objective(Objective(diff2_flow=ON, noise=Noise(offset=0.1)), FAMILIES["sdxl"], SDXL)
    clean = torch.linspace(-1, 1, len(seeds) * 24).reshape(len(seeds), 4, 2, 3)

    def draw(samples: Tensor, chosen: Sequence[int]) -> Any:
        given = [torch.Generator().manual_seed(seed) for seed in chosen]
        return objective.prepare(samples, given, stage=WHOLE, tokens=6)

    batch = draw(clean, seeds)
    for index, seed in enumerate(seeds):
        alone = draw(clean[index : index + 1], [seed])
        for name in ("time", "noisy", "target", "weight"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[index])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_is_cut_at_the_largest_and_not_below() -> None:
    clean = torch.zeros(64, 1, 1, 1)
    _, free = made(Objective(diff2_flow=ON), clean)
    _, cut = made(Objective(diff2_flow=Diff2Flow(max_weight=5.0)), clean)
    assert free.weight.max() > 5
    assert torch.equal(cut.weight, free.weight.clamp(max=5.0))
    assert torch.equal(cut.noisy, free.noisy)


@pytest.mark.parametrize(
    ("betas", "last", "logit_normal", "uniform"),
    [
        (SDXL, 244, 10.6, 30),
        (SDXL | {"beta_end": 0.014, "num_train_timesteps": 1100}, 904, 11.4, 59),
        ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, 25093, 11.7, 316),
    ],
    ids=["sdxl", "kolors", "pixart_sigma"],
)
def test_the_page_says_how_much_noisy_steps_count(
    betas: dict[str, Any], last: float, logit_normal: float, uniform: float
) -> None:
    schedule = BetaSchedule(betas, zero_terminal_snr=False, prediction="epsilon")
    weights = flow_weight(schedule.alpha_bars.double(), "epsilon", None)
    assert float(weights[-1]) == pytest.approx(last, abs=0.5)
    for density, mean in ((LogitNormal(0.0, 1.0), logit_normal), (Uniform(), uniform)):
        drawn = FlowTimes(schedule, density, 1.0).probabilities
        assert float((drawn * weights).sum()) == pytest.approx(mean, rel=0.01)
    assert f"{last:,}".replace(",", " ") + f" | {logit_normal} | {uniform} |" in PAGE.read_text()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_largest_weight_of_one_draws_times_and_weighs_nothing(prediction: str) -> None:
    clean = torch.zeros(64, 1, 1, 1)
    _, prepared = made(Objective(prediction=prediction, diff2_flow=Diff2Flow(max_weight=1.0)), clean)
    _, free = made(Objective(prediction=prediction, diff2_flow=ON), clean)
    assert torch.equal(prepared.weight, torch.ones(64))
    assert torch.equal(prepared.time, free.time)


def test_v_without_a_signal_has_weight_one_and_is_all_noise() -> None:
    noise, density = Noise(zero_terminal_snr=True), Timesteps(sampling="uniform")
    spec = Objective(prediction="v", diff2_flow=ON, noise=noise, timesteps=density)
    objective = build_objective(spec, FAMILIES["sdxl"], SDXL)
    prepared = objective.prepare(torch.ones(1, 4, 2, 2), generators(1), stage=Stage("unet", 0.999, 1.0), tokens=4)
    assert prepared.time.item() == 999
    assert prepared.weight.item() == 1
    assert flow_sigma(torch.zeros(1)).item() == 1


def test_the_mean_weight_that_is_logged_is_that_of_what_is_drawn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _, prepared = made(Objective(prediction="v", diff2_flow=ON), torch.zeros(4000, 1, 1, 1))
    [record] = [each for each in caplog.records if each.message == "flow objective"]
    assert record.__dict__["mean_weight"] == pytest.approx(prepared.weight.mean().item(), rel=0.02)
    assert record.__dict__["largest_weight"] == pytest.approx(2, abs=0.001)


def test_off_draws_and_weighs_as_ever() -> None:
    objective, prepared = made(Objective(), torch.zeros(8, 1, 1, 1))
    assert isinstance(objective.schedule, BetaSchedule)
    assert torch.equal(prepared.weight, torch.ones(8))
    expected = [int(torch.randint(0, 1000, (), generator=generator)) for generator in generators(8)]
    assert prepared.time.tolist() == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("flux", "flow"), ("stable_cascade", "cosine")])
def test_a_family_without_betas_has_no_bridge(family: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"spec\.objective\.diff2Flow is a mapping; only for .* is of {kind}"):
        build_objective(Objective(diff2_flow=ON), FAMILIES[family], {})


def test_times_are_drawn_as_the_run_says() -> None:
    early = Timesteps(sampling="logit-normal", logit_mean=-2.0)
    _, clean = made(Objective(diff2_flow=ON, timesteps=early), torch.zeros(200, 1, 1, 1))
    _, noisy = made(Objective(diff2_flow=ON, timesteps=Timesteps(shift="9")), torch.zeros(200, 1, 1, 1))
    assert clean.time.float().mean() + 200 < noisy.time.float().mean()
