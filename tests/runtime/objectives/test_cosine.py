"""Diffusion on a cosine of a continuous time: what diffusers' scheduler samples on, draws of the time, min-SNR, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Noise, Objective
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective

FACTS = FamilyFacts(
    name="tiny_cosine", title="", modality="image", objective="diffusion", pixel_multiple=8, latent_channels=4,
    latent_factor=8, patch=1, shift="none", licence="", flavours=(), noise_schedule="cosine",
)  # fmt: skip
CONFIG = dict(DDPMWuerstchenScheduler().config) | {"_class_name": "DDPMWuerstchenScheduler"}
LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
WHOLE = Stage("prior")


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("scaler", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("offset", [0.008, 0.1])
def test_noisy_is_what_the_checkpoints_scheduler_makes_of_clean_and_noise(scaler: float, offset: float) -> None:
    scheduler = DDPMWuerstchenScheduler(scaler=scaler, s=offset)
    config = dict(scheduler.config) | {"_class_name": "DDPMWuerstchenScheduler"}
    clean = torch.randn(64, 4, 2, 3, generator=torch.Generator().manual_seed(9))
    made = build_objective(Objective(), FACTS, config).prepare(clean, generators(64), stage=WHOLE, tokens=6)
    torch.testing.assert_close(made.noisy, scheduler.add_noise(clean, made.target, made.time), atol=1e-5, rtol=1e-5)
    assert made.time.dtype == torch.float32
    assert torch.equal(made.weight, torch.ones(64))


def test_signal_is_that_of_the_paper_and_never_all_or_nothing() -> None:
    objective = build_objective(Objective(), FACTS, {"_class_name": "DDPMWuerstchenScheduler"})
    times = torch.tensor([1e-6, 0.25, 0.5, 0.75, 1.0])
    signal = objective.schedule.alpha_bar(times)  # type: ignore[attr-defined]
    whole = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    paper = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / whole for t in (0.25, 0.5, 0.75)]
    torch.testing.assert_close(signal, torch.tensor([0.9999, *paper, 0.0001]), atol=1e-6, rtol=1e-5)


def test_the_draw_of_a_sample_is_its_time_and_then_its_noise() -> None:
    made = build_objective(Objective(), FACTS, CONFIG).prepare(
        torch.zeros(1, 4, 2, 3), generators(1), stage=WHOLE, tokens=6
    )
    generator = torch.Generator().manual_seed(0)
    assert made.time.item() == pytest.approx(1 - torch.rand((), generator=generator, dtype=torch.float64).item())
    assert torch.equal(made.target[0], torch.randn(4, 2, 3, generator=generator))


def test_every_time_is_drawn_alike() -> None:
    made = build_objective(Objective(), FACTS, CONFIG).prepare(
        torch.zeros(4000, 1, 1, 1), generators(4000), stage=WHOLE, tokens=1
    )
    assert 0 < made.time.min() < made.time.max() <= 1
    counts = torch.histc(made.time, bins=10, min=0, max=1) / 4000
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.02)


def test_a_stage_draws_only_its_own_times() -> None:
    objective = build_objective(Objective(), FACTS, CONFIG)
    low, high = Stage("a", 0.0, 0.25), Stage("b", 0.25, 1.0)
    made = objective.prepare(torch.zeros(64, 1, 1, 1), generators(64), stage=high, tokens=1)
    assert made.time.min() >= 0.25
    assert (objective.mass(low, 1), objective.mass(high, 1)) == (0.25, 0.75)
    with pytest.raises(ConfigError, match=r"a 0\.5 to 0\.5"):
        objective.prepare(torch.zeros(1, 1, 1, 1), generators(1), stage=Stage("a", 0.5, 0.5), tokens=1)


def test_min_snr_weighs_by_the_signal_of_the_cosine() -> None:
    objective = build_objective(Objective(min_snr_gamma=5.0), FACTS, CONFIG)
    made = objective.prepare(torch.zeros(64, 1, 1, 1), generators(64), stage=WHOLE, tokens=1)
    kept = DDPMWuerstchenScheduler().add_noise(torch.ones(64, 1), torch.zeros(64, 1), made.time).square().flatten()
    snr = kept / (1 - kept)
    torch.testing.assert_close(made.weight, snr.clamp(max=5.0) / snr, atol=1e-5, rtol=1e-4)
    assert made.weight.min() < 0.1


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (Objective(prediction="v"), CONFIG, "spec.objective.prediction is 'v'; only for families with betas"),
        (Objective(noise=Noise(zero_terminal_snr=True)), CONFIG, "spec.objective.noise.zeroTerminalSnr is true"),
        (Objective(), LINEAR, "scheduler is DDPMScheduler; this family is trained and sampled on the cosine"),
        (
            Objective(),
            {"beta_schedule": "linear"},
            "scheduler is None; this family is trained and sampled on the cosine",
        ),
    ],
)
def test_what_a_cosine_does_not_know_is_refused(spec: Objective, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(spec, FACTS, config)


def test_a_family_with_betas_refuses_the_scheduler_of_a_cosine() -> None:
    with pytest.raises(ConfigError, match="names no beta_schedule"):
        build_objective(Objective(), replace(FACTS, noise_schedule="betas"), CONFIG)
