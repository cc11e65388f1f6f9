"""The flow objective: its numbers, its refusals, and draws that depend on nothing but a sample's own generator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES, FamilyFacts
from atelier_api.v1alpha1.objective import Noise, Objective, Timesteps
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.timesteps import EmpiricalShift, LogitNormal, shift_sigma

FLOW = FamilyFacts(
    name="tiny_flow", title="", modality="image", objective="flow", pixel_multiple=16, latent_channels=4,
    latent_factor=8, patch=2, shift=3.0, licence="", flavours=(),
)  # fmt: skip
WHOLE = Stage("transformer")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noisy_is_the_straight_line_from_clean_to_noise_and_the_target_is_its_velocity() -> None:
    clean = torch.randn(3, 4, 8, 8)
    made = build_objective(Objective(), FLOW, {}).prepare(clean, generators(1, 2, 3), stage=WHOLE, tokens=16)
    level = made.time.view(3, 1, 1, 1)
    noise = clean + made.target
    torch.testing.assert_close(made.noisy, (1 - level) * clean + level * noise)
    assert torch.equal(made.weight, torch.ones(3))
    assert made.time.dtype == made.noisy.dtype == made.target.dtype == torch.float32


def test_a_sample_draws_sigma_first_and_then_its_noise() -> None:
    clean, generator = torch.randn(1, 4, 8, 8), torch.Generator().manual_seed(5)
    uniform = 1 - float(torch.rand((), generator=generator, dtype=torch.float64))
    noise = torch.randn(4, 8, 8, generator=generator)
    sigma = torch.tensor(shift_sigma(LogitNormal(0, 1).quantile(uniform), 3.0), dtype=torch.float32)
    made = build_objective(Objective(), FLOW, {}).prepare(clean, generators(5), stage=WHOLE, tokens=16)
    assert torch.equal(made.time[0], sigma)
    assert torch.equal(made.target[0], noise - clean[0])
    assert torch.equal(made.noisy[0], (1 - sigma) * clean[0] + sigma * noise)


def test_a_generator_is_not_shared_by_samples() -> None:
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        build_objective(Objective(), FLOW, {}).prepare(torch.zeros(2, 4, 8, 8), generators(1), stage=WHOLE, tokens=16)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=4), st.sampled_from(["logit-normal", "uniform", "beta"]))
@settings(max_examples=25, deadline=None)
def test_a_sample_draws_the_same_alone_and_in_a_batch(seeds: list[int], sampling: str) -> None:
    objective = build_objective(Objective(timesteps=Timesteps(sampling=sampling)), FLOW, {})
    clean = torch.linspace(-1, 1, len(seeds) * 4 * 6).reshape(len(seeds), 4, 2, 3)
    batch = objective.prepare(clean, generators(*seeds), stage=WHOLE, tokens=16)
    for index, seed in enumerate(seeds):
        alone = objective.prepare(clean[index : index + 1], generators(seed), stage=WHOLE, tokens=16)
        assert torch.equal(alone.time[0], batch.time[index])
        assert torch.equal(alone.noisy[0], batch.noisy[index])
        assert torch.equal(alone.target[0], batch.target[index])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    clean = torch.ones(2, 4, 8, 8)
    objective = build_objective(Objective(), FLOW, {})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = objective.prepare(clean, generators(1, 2), stage=WHOLE, tokens=16)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.noisy, objective.prepare(clean, generators(1, 2), stage=WHOLE, tokens=16).noisy)


def test_bf16_latents_of_a_clip_are_noised_in_fp32() -> None:
    clean = torch.randn(2, 4, 3, 8, 8).bfloat16()
    made = build_objective(Objective(), FLOW, {}).prepare(clean, generators(1, 2), stage=WHOLE, tokens=48)
    whole = build_objective(Objective(), FLOW, {}).prepare(clean.float(), generators(1, 2), stage=WHOLE, tokens=48)
    assert made.noisy.shape == clean.shape
    assert torch.equal(made.noisy, whole.noisy)


def test_the_dynamic_shift_follows_the_number_of_tokens() -> None:
    objective = build_objective(Objective(timesteps=Timesteps(shift="dynamic")), FLOW, {})
    clean = torch.zeros(1, 4, 8, 8)
    few = objective.prepare(clean, generators(3), stage=WHOLE, tokens=256).time
    many = objective.prepare(clean, generators(3), stage=WHOLE, tokens=4096).time
    expected = shift_sigma(float(few), torch.tensor(1.15 - 0.5).exp().item())
    assert float(many) == pytest.approx(expected, rel=1e-5)


def test_all_samples_of_a_stage_lie_in_its_range() -> None:
    objective = build_objective(Objective(), FLOW, {})
    made = objective.prepare(torch.zeros(64, 1, 1, 1), generators(*range(64)), stage=Stage("low", 0.2, 0.6), tokens=16)
    assert made.time.min() >= 0.2
    assert made.time.max() <= 0.6


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (Objective(min_snr_gamma=5.0), "spec.objective.minSnrGamma is '5'"),
        (Objective(prediction="epsilon"), "spec.objective.prediction is 'epsilon'"),
        (Objective(noise=Noise(offset=0.1)), "spec.objective.noise.offset is '0.1'"),
        (Objective(noise=Noise(zero_terminal_snr=True)), "spec.objective.noise.zeroTerminalSnr is true"),
    ],
)
def test_an_option_of_diffusion_families_is_refused_by_name(spec: Objective, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}; only for diffusion families, and tiny_flow is of flow"):
        build_objective(spec, FLOW, {})


FLOWS = [facts for facts in FAMILIES.values() if facts.objective == "flow"]


def drawn(facts: FamilyFacts, config: dict[str, object], tokens: int = 16, **timesteps: object) -> list[float]:
    """Noise levels of 20 samples of a checkpoint with that scheduler."""
    spec = Objective.model_validate({"timesteps": timesteps})
    clean = torch.zeros(20, 1, 1, 1)
    made = build_objective(spec, facts, config).prepare(clean, generators(*range(20)), stage=WHOLE, tokens=tokens)
    return made.time.tolist()


def shifted(facts: FamilyFacts, k: float, **timesteps: object) -> list[float]:
    return [shift_sigma(sigma, k) for sigma in drawn(facts, {}, **({"shift": "none"} | timesteps))]


@pytest.mark.parametrize("facts", FLOWS, ids=lambda facts: facts.name)
def test_no_default_shift_beats_that_of_the_checkpoint(facts: FamilyFacts) -> None:
    """But where the stock pipeline shifts by a number of its own."""
    expected = facts.shift if facts.own_shift else 7.0
    k = EmpiricalShift().factor(16) if expected == "empirical" else float(expected)
    assert drawn(facts, {"shift": 7.0}) == pytest.approx(shifted(facts, k))


@pytest.mark.cell("shift")
@pytest.mark.parametrize("facts", FLOWS, ids=lambda facts: facts.name)
def test_no_family_ignores_the_shift_of_the_run(facts: FamilyFacts) -> None:
    assert drawn(facts, {"shift": 7.0}, shift="2.0") == pytest.approx(shifted(facts, 2.0))


@pytest.mark.parametrize("facts", FLOWS, ids=lambda facts: facts.name)
def test_no_family_ignores_the_density_of_the_run(facts: FamilyFacts) -> None:
    """Uniform draws are the generators' own numbers."""
    found = drawn(facts, {"shift": 7.0}, shift="none", sampling="uniform")
    own = [1 - float(torch.rand((), generator=each, dtype=torch.float64)) for each in generators(*range(20))]
    assert found == pytest.approx(own)


@pytest.mark.parametrize("facts", [each for each in FLOWS if not each.own_shift], ids=lambda facts: facts.name)
def test_a_dynamic_checkpoint_is_trained_with_a_dynamic_shift_and_not_only_sampled_with_it(facts: FamilyFacts) -> None:
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    small, large = (drawn(facts, dynamic, tokens) for tokens in (256, 4096))
    assert small == pytest.approx(shifted(facts, math.exp(0.5)))
    assert large == pytest.approx(shifted(facts, math.exp(1.15)))


def test_what_a_schedule_ends_at_is_of_sampling_alone() -> None:
    """`shift_terminal` stretches the sampler's few steps so that the last is not yet clean; training draws all levels."""
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05}
    assert drawn(FLOW, dynamic | {"shift_terminal": 0.1}, 1024) == drawn(FLOW, dynamic, 1024)
