"""The diffusion objective: the checkpoint's own schedule, epsilon and v, min-SNR, offset noise, zero terminal SNR, refusals."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Noise, Objective, Timesteps
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective

FACTS = FamilyFacts(
    name="tiny_diffusion", title="", modality="image", objective="diffusion", pixel_multiple=8, latent_channels=4,
    latent_factor=8, patch=1, shift="none", licence="", flavours=(),
)  # fmt: skip
CONFIG = dict(
    EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1).config
)
WHOLE = Stage("unet")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def scheduler(**changes: object) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **changes)


def test_noisy_follows_the_checkpoints_betas_and_the_target_is_the_noise() -> None:
    clean = torch.randn(2, 4, 8, 8)
    made = build_objective(Objective(), FACTS, CONFIG).prepare(clean, generators(1, 2), stage=WHOLE, tokens=64)
    for index, seed in enumerate((1, 2)):
        generator = torch.Generator().manual_seed(seed)
        time = torch.randint(0, 1000, (), generator=generator)
        noise = torch.randn(4, 8, 8, generator=generator)
        alpha_bar = scheduler().alphas_cumprod[time]
        assert made.time[index] == time
        assert torch.equal(made.target[index], noise)
        assert torch.equal(made.noisy[index], alpha_bar**0.5 * clean[index] + (1 - alpha_bar) ** 0.5 * noise)
    assert made.time.dtype == torch.long
    assert torch.equal(made.weight, torch.ones(2))


def test_v_is_a_times_noise_minus_b_times_clean() -> None:
    clean = torch.randn(1, 4, 8, 8)
    epsilon = build_objective(Objective(), FACTS, CONFIG).prepare(clean, generators(1), stage=WHOLE, tokens=64)
    made = build_objective(Objective(prediction="v"), FACTS, CONFIG).prepare(
        clean, generators(1), stage=WHOLE, tokens=64
    )
    alpha_bar = scheduler().alphas_cumprod[made.time]
    torch.testing.assert_close(made.target, alpha_bar**0.5 * epsilon.target - (1 - alpha_bar) ** 0.5 * clean)


@pytest.mark.parametrize(
    ("user", "checkpoint", "expected"),
    [
        ("auto", "epsilon", "epsilon"),
        ("auto", "v_prediction", "v"),
        ("epsilon", "v_prediction", "epsilon"),
        ("v", "epsilon", "v"),
    ],
)
def test_the_prediction_is_the_users_else_the_checkpoints(user: str, checkpoint: str, expected: str) -> None:
    objective = build_objective(Objective(prediction=user), FACTS, {**CONFIG, "prediction_type": checkpoint})
    assert objective.prediction == expected  # type: ignore[attr-defined]


def test_every_step_of_the_schedule_is_drawn_alike() -> None:
    objective = build_objective(Objective(), FACTS, {**CONFIG, "num_train_timesteps": 1100})
    made = objective.prepare(torch.zeros(4400, 1, 1, 1), generators(*range(4400)), stage=WHOLE, tokens=1)
    assert made.time.min() >= 0
    assert 1090 < made.time.max() < 1100
    counts = torch.histc(made.time.float(), bins=11, min=0, max=1100) / 4400
    torch.testing.assert_close(counts, torch.full((11,), 1 / 11), rtol=0, atol=0.02)


def test_a_stage_draws_only_its_own_steps() -> None:
    objective = build_objective(Objective(), FACTS, CONFIG)
    low, high = Stage("a", 0.0, 0.2), Stage("b", 0.2, 1.0)
    made = objective.prepare(torch.zeros(64, 1, 1, 1), generators(*range(64)), stage=low, tokens=1)
    assert made.time.max() < 200
    assert (objective.mass(low, 1), objective.mass(high, 1)) == (0.2, 0.8)
    with pytest.raises(ConfigError, match=r"a 0\.5 to 0\.5"):
        objective.prepare(torch.zeros(1, 1, 1, 1), generators(1), stage=Stage("a", 0.5, 0.5), tokens=1)


def test_a_generator_is_not_shared_by_samples() -> None:
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        build_objective(Objective(), FACTS, CONFIG).prepare(
            torch.zeros(2, 4, 8, 8), generators(1), stage=WHOLE, tokens=16
        )


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=4), st.sampled_from([0.0, 0.1]))
@settings(max_examples=20, deadline=None)
def test_a_sample_draws_the_same_alone_and_in_a_batch(seeds: list[int], offset: float) -> None:
    objective = build_objective(Objective(noise=Noise(offset=offset), min_snr_gamma=5.0), FACTS, CONFIG)
    clean = torch.linspace(-1, 1, len(seeds) * 4 * 6).reshape(len(seeds), 4, 2, 3)
    batch = objective.prepare(clean, generators(*seeds), stage=WHOLE, tokens=6)
    for index, seed in enumerate(seeds):
        alone = objective.prepare(clean[index : index + 1], generators(seed), stage=WHOLE, tokens=6)
        for name in ("time", "noisy", "target", "weight"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[index])


# --- min-SNR ----------------------------------------------------------------------------------------------------------


def weights(spec: Objective, count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and SNR, by diffusers, of `count` draws."""
    made = build_objective(spec, FACTS, CONFIG).prepare(
        torch.zeros(count, 1, 1, 1), generators(*range(count)), stage=WHOLE, tokens=1
    )
    return made.weight, compute_snr(scheduler(), made.time)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weighs_epsilon_by_the_clipped_over_the_true_snr(gamma: float) -> None:
    weight, snr = weights(Objective(min_snr_gamma=gamma))
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(gamma)) / snr)
    assert weight.max() <= 1
    assert weight.min() < 1


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weighs_v_by_the_clipped_snr_over_snr_plus_one(gamma: float) -> None:
    weight, snr = weights(Objective(min_snr_gamma=gamma, prediction="v"))
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(gamma)) / (snr + 1))


def test_min_snr_gives_both_predictions_the_same_weight_on_the_clean_picture() -> None:
    # An error e in x0 is an error sqrt(SNR) e in epsilon and e / sqrt(1 - abar) in v, up to sign.
    epsilon, snr = weights(Objective(min_snr_gamma=5.0))
    velocity, _ = weights(Objective(min_snr_gamma=5.0, prediction="v"))
    torch.testing.assert_close(epsilon * snr, velocity * (snr + 1))


def test_a_large_gamma_gives_epsilon_weight_one() -> None:
    config = {**CONFIG, "trained_betas": [0.5, 0.5, 0.5]}
    made = build_objective(Objective(min_snr_gamma=100.0), FACTS, config).prepare(
        torch.zeros(32, 1, 1, 1), generators(*range(32)), stage=WHOLE, tokens=1
    )
    assert torch.equal(made.weight, torch.ones(32))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_offset_noise_adds_one_value_per_sample_and_channel_after_the_noise() -> None:
    clean = torch.zeros(1, 4, 8, 8)
    plain = build_objective(Objective(), FACTS, CONFIG).prepare(clean, generators(9), stage=WHOLE, tokens=64)
    spec = Objective(noise=Noise(offset=0.1))
    made = build_objective(spec, FACTS, CONFIG).prepare(clean, generators(9), stage=WHOLE, tokens=64)
    difference = made.target - plain.target
    assert torch.equal(made.time, plain.time)
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), rtol=0, atol=1e-6)
    assert len(set(difference[0, :, 0, 0].tolist())) == 4


def test_offset_noise_has_element_variance_one_plus_its_strength_squared() -> None:
    spec = Objective(noise=Noise(offset=0.5))
    made = build_objective(spec, FACTS, CONFIG).prepare(
        torch.zeros(4000, 4, 2, 2), generators(*range(4000)), stage=WHOLE, tokens=4
    )
    assert float(made.target.var()) == pytest.approx(1.25, rel=0.03)


def test_zero_terminal_snr_has_no_signal_in_the_last_step() -> None:
    spec = Objective(prediction="v", noise=Noise(zero_terminal_snr=True))
    objective = build_objective(spec, FACTS, CONFIG)
    last = Stage("unet", 0.999, 1.0)
    clean = torch.randn(1, 4, 8, 8)
    made = objective.prepare(clean, generators(1), stage=last, tokens=64)
    assert made.time.item() == 999
    assert objective.schedule.alpha_bars[-1] == 0  # type: ignore[attr-defined]
    assert torch.equal(made.target, -clean)  # v = a eps - b x0 with a = 0, b = 1


def test_zero_terminal_snr_off_leaves_the_checkpoints_betas_to_the_bit() -> None:
    objective = build_objective(Objective(), FACTS, CONFIG)
    assert torch.equal(objective.schedule.alpha_bars, scheduler().alphas_cumprod)  # type: ignore[attr-defined]


def test_a_checkpoint_that_rescales_its_betas_is_trained_with_them() -> None:
    config = {**CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    objective = build_objective(Objective(), FACTS, config)
    assert objective.schedule.alpha_bars[-1] == 0  # type: ignore[attr-defined]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (Objective(timesteps=Timesteps(sampling="beta")), {}, "spec.objective.timesteps.sampling is 'beta'"),
        (Objective(timesteps=Timesteps(shift="3.0")), {}, "spec.objective.timesteps.shift is '3.0'"),
        (Objective(timesteps=Timesteps(logit_mean=1.0)), {}, "spec.objective.timesteps.logitMean is '1'"),
        (Objective(noise=Noise(zero_terminal_snr=True)), {}, "spec.objective.noise.zeroTerminalSnr is true"),
        (Objective(), {"rescale_betas_zero_snr": True}, "the checkpoint's rescale_betas_zero_snr is true"),
        (Objective(), {"prediction_type": "sample"}, "prediction_type 'sample'"),
        (Objective(), {"beta_schedule": None}, "names no beta_schedule"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(spec: Objective, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(spec, FACTS, {**CONFIG, **config})
