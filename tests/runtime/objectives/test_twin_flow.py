"""TwinFlow: numbers of its targets by networks whose average velocity is known, its draws, and who gets a gradient."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime.family import Conditions, Stage
from atelier_runtime.few_steps import Times
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.twin_flow import (
    ANY,
    FAKE,
    NEAR,
    WHOLE,
    Passes,
    PreparedSteps,
    TwinFlowObjective,
    robust,
)
from atelier_runtime.run_network import RunNetwork

FLOW = FamilyFacts(
    name="tiny_flow", title="", modality="image", objective="flow", pixel_multiple=16, latent_channels=4,
    latent_factor=8, patch=2, shift="none", licence="", flavours=(),
)  # fmt: skip
STAGE = Stage("transformer")
SHAPE = (2, 3, 4)

Velocity = Callable[[Tensor, Times, Conditions], Tensor]


class Network(nn.Module):
    """A denoiser of one trained number, `few_steps` and all, whose velocity is a function of what it is told."""

    def __init__(self, velocity: Velocity) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.velocity = velocity
        self.times: Times | None = None
        self.passes: list[tuple[Times, bool, Tensor, Conditions]] = []

    def get_submodule(self, target: str) -> "Network":  # type: ignore[override]
        return self

    @contextmanager
    def telling(self, times: Times) -> Iterator[None]:
        self.times = times
        yield
        self.times = None


class Family:
    """Calls the network as the trainer's families do."""

    def predict(self, denoiser: Any, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        assert torch.equal(time, denoiser.times.start)
        denoiser.passes.append((denoiser.times, torch.is_grad_enabled(), noisy, conditions))
        return denoiser.gain * denoiser.velocity(noisy, denoiser.times, conditions)


CAPTION = Conditions(text={"embeds": torch.ones(1)}, sizes=torch.zeros(1, 6))
EMPTY = Conditions(text={"embeds": torch.zeros(1)}, sizes=torch.zeros(1, 6))


@pytest.fixture(autouse=True)
def _network_is_its_own_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atelier_runtime.objectives.twin_flow.few_steps_of", lambda denoiser: denoiser)


def objective(**twin: Any) -> TwinFlowObjective:
    made = build_objective(Objective.model_validate({"twinFlow": {"enhancedRatio": "0", **twin}}), FLOW, {})
    assert isinstance(made, TwinFlowObjective)
    return made


def asked(network: Network, teacher_gain: float = 1.0) -> RunNetwork:
    """The network, whose moving average is `teacher_gain` of it."""

    @contextmanager
    def averaged() -> Iterator[None]:
        kept = network.gain.detach().clone()
        with torch.no_grad():
            network.gain.fill_(teacher_gain)
            yield
            network.gain.copy_(kept)

    made = RunNetwork(Family(), (), bf16=False, device=torch.device("cpu"), averaged=averaged)  # type: ignore[arg-type]
    made.denoiser, made.conditions, made.contrast = network, CAPTION, EMPTY
    return made


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + seed) for seed in range(count)]


def prepared(made: TwinFlowObjective, count: int = 24) -> tuple[Tensor, PreparedSteps]:
    clean = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(7))
    return clean, made.prepare(clean, generators(count), stage=STAGE, tokens=16)


def steps_of(start: float, end: float, count: int = 3) -> PreparedSteps:
    """Steps of a straight path, all alike."""
    clean, noise = (torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    whole = torch.ones(count)
    return PreparedSteps(
        noisy=(1 - start) * clean + start * noise, time=start * whole, target=noise - clean, weight=whole,
        end=end * whole, role=ANY * whole, noise=noise, fresh=noise, level=whole,
    )  # fmt: skip


def straight(steps: PreparedSteps) -> Velocity:
    return lambda _noisy, _times, _told: steps.target


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.8, 0.3), (0.5, 0.495), (0.4, 0.4)])
def test_on_a_straight_path_nothing_is_left_to_learn(order: int, start: float, end: float) -> None:
    made, steps = objective(order=order, adversarial=False, rectifyWeight="0"), steps_of(start, end)
    losses = made.losses(asked(Network(straight(steps))), steps, None)
    assert losses.max() < 1e-4
    apart = made.losses(asked(Network(lambda *_: 1.5 * steps.target)), steps, None)
    assert apart.min() > 0.01


def test_on_a_curved_path_the_residual_is_0_at_the_average_velocity_in_the_limit_of_small_steps() -> None:
    """x' = x has x_r = x_s e^(r - s): the average velocity is x_s (1 - e^(r - s)) / (s - r), and at r = s it is x_s."""

    def average(noisy: Tensor, times: Times, _: Conditions) -> Tensor:
        span = (times.start - times.end).view(-1, 1, 1, 1)
        return noisy * torch.where(span > 0, (1 - torch.exp(-span)) / span.clamp(min=1e-6), torch.ones_like(span))

    worst = []
    for delta in ("0.1", "0.01", "0.001"):
        made, steps = objective(order=2, delta=delta, adversarial=False, rectifyWeight="0"), steps_of(0.9, 0.2)
        steps = replace(steps, target=steps.noisy, noisy=steps.noisy.double(), time=steps.time.double())
        steps = replace(steps, end=steps.end.double(), target=steps.target.double())
        network = asked(Network(average))
        travelled = made._travelled(Passes(network), steps, steps.target)
        prediction = average(steps.noisy, Times(steps.time, steps.end, steps.role > 9), CAPTION)
        worst.append(float(made.residual(prediction, travelled, steps).abs().max()))
    assert worst[1] < worst[0] / 8
    assert worst[2] < worst[1] / 8


def test_where_a_step_is_empty_the_loss_is_that_of_plain_flow_matching() -> None:
    made, steps = objective(adversarial=False, rectifyWeight="0"), steps_of(0.6, 0.6)
    network = Network(lambda noisy, *_: steps.target + 0.1 * noisy)
    losses = made.losses(asked(network), steps, None)
    difference = network.gain * (steps.target + 0.1 * steps.noisy) - steps.target
    torch.testing.assert_close(losses, robust(difference, None))
    [gradient] = torch.autograd.grad(losses.sum(), network.gain)
    mean = difference.square().flatten(1).mean(1)
    [plain] = torch.autograd.grad((mean / (mean.detach() + 1e-6).sqrt()).sum(), network.gain)
    torch.testing.assert_close(gradient, plain)


def test_the_enhanced_target_adds_what_the_caption_makes_of_the_velocity() -> None:
    made, steps = objective(enhancedRatio="0.5", adversarial=False, rectifyWeight="0"), steps_of(0.6, 0.6)

    def velocity(noisy: Tensor, _: Times, told: Conditions) -> Tensor:
        return steps.target + told.text["embeds"] * noisy

    network = Network(velocity)
    losses = made.losses(asked(network), steps, None)  # u' = u + 0.5 x, and the prediction is u + x
    torch.testing.assert_close(losses, robust(0.5 * steps.noisy, None))
    empty = [told.text["embeds"].item() == 0 for *_, told in network.passes]
    assert Counter(empty) == {True: 1, False: 4}  # two for the difference, two legs, one that trains


def test_a_target_is_no_farther_than_the_clamp() -> None:
    made, steps = objective(targetClamp="0.25", adversarial=False, rectifyWeight="0"), steps_of(0.6, 0.6)
    losses = made.losses(asked(Network(lambda noisy, *_: steps.target + 100)), steps, None)
    torch.testing.assert_close(losses, torch.full_like(losses, 0.25), rtol=1e-4, atol=0)


def test_whole_steps_are_moved_by_what_the_twin_tells_from_the_network_at_what_they_draw() -> None:
    made, steps = objective(rectifyWeight="0.5", delta="0.5"), steps_of(1.0, 0.0)
    steps = replace(steps, role=torch.full_like(steps.role, WHOLE), level=torch.full_like(steps.level, 0.7))

    def velocity(noisy: Tensor, times: Times, _: Conditions) -> Tensor:
        return steps.target + 0.2 * times.negative.float().view(-1, 1, 1, 1)

    network = Network(velocity)
    losses = made.losses(asked(network), steps, None)
    torch.testing.assert_close(losses, torch.full_like(losses, 0.5 * 0.2), rtol=1e-3, atol=0)
    negative = [(times, noisy) for times, _, noisy, _ in network.passes if times.negative.any()]
    [(times, noisy)] = negative
    drawn = steps.noise - steps.target
    torch.testing.assert_close(noisy, 0.3 * drawn + 0.7 * steps.fresh)
    assert times.start.tolist() == times.end.tolist() == pytest.approx([0.7] * 3)
    # F - D with D > 0: descent makes the velocity smaller.
    [gradient] = torch.autograd.grad(losses.sum(), network.gain)
    expected = 0.5 * 2 * 0.2 * steps.target.flatten(1).mean(1) / 0.2
    torch.testing.assert_close(gradient, expected.sum(), rtol=1e-3, atol=1e-4)


def test_fakes_teach_negative_times_the_velocity_to_what_one_step_draws() -> None:
    made = objective(rectifyWeight="0")
    clean, steps = prepared(made)
    fake = steps.role == FAKE
    assert fake.any()
    network = Network(lambda noisy, *_: 0.5 * noisy)
    losses = made.losses(asked(network), steps, None)
    [(times, _, noisy, _)] = [each for each in network.passes if each[1]]
    assert torch.equal(times.negative, fake)
    level = steps.level.view(-1, 1, 1, 1)
    drawn = 0.5 * steps.noise
    torch.testing.assert_close(noisy[fake], ((1 - level) * drawn + level * steps.fresh)[fake])
    difference = 0.5 * noisy - (steps.fresh - drawn)
    expected = robust(difference.clamp(-1, 1), None)
    torch.testing.assert_close(losses[fake], expected[fake])
    assert not torch.equal(noisy[~fake], clean[~fake])


def test_two_samples_have_the_losses_of_the_two_alone_whatever_their_roles() -> None:
    made = objective(enhancedRatio="0.3")
    clean, steps = prepared(made)

    def velocity(noisy: Tensor, times: Times, told: Conditions) -> Tensor:
        span, sign = (each.view(-1, 1, 1, 1) for each in (times.start - times.end, times.negative.float()))
        return noisy * (0.3 + 0.2 * span + 0.1 * sign) + 0.1 * told.text["embeds"]

    assert set(steps.role.tolist()) == {WHOLE, NEAR, ANY, FAKE}
    together = made.losses(asked(Network(velocity)), steps, None)
    for index in range(len(clean)):
        alone = made.prepare(clean[index : index + 1], generators(1, index), stage=STAGE, tokens=16)
        torch.testing.assert_close(made.losses(asked(Network(velocity)), alone, None)[0], together[index])


def test_roles_come_equally_often_and_have_their_steps() -> None:
    made = objective()
    _, steps = prepared(made, 2000)
    counts = Counter(steps.role.tolist())
    assert all(abs(counts[role] - 500) < 5 * math.sqrt(500 * 0.75) for role in (WHOLE, NEAR, ANY, FAKE))
    s, r, role = steps.time, steps.end, steps.role
    assert (s[role == WHOLE] == 1).all()
    assert (r[role == WHOLE] == 0).all()
    near, free = role == NEAR, role == ANY
    assert (r[near] <= s[near]).all()
    assert (r[near] >= 0.95 * s[near] - 1e-6).all()
    assert (r[free] < s[free]).all()
    assert float((r / s)[free].mean()) == pytest.approx(0.5, abs=0.06)
    assert torch.equal(s[role == FAKE], steps.level[role == FAKE])
    assert torch.equal(r[role == FAKE], steps.level[role == FAKE])
    real = role != FAKE
    torch.testing.assert_close(steps.weight[real], torch.tan((1 - (s - r)[real]) * math.pi / 2.5) + 1)
    assert (steps.weight[~real] == 1).all()
    assert (
        FAKE
        not in objective(adversarial=False, rectifyWeight="0")
        .prepare(torch.zeros(200, *SHAPE), generators(200), stage=STAGE, tokens=16)
        .role
    )


def test_the_passes_are_the_same_for_every_mix_of_roles_and_the_teachers_come_first_without_gradient() -> None:
    made = objective(enhancedRatio="0.5", order=3)
    numbers = set()
    for first in range(6):
        clean = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(first))
        steps = made.prepare(clean, generators(1, first), stage=STAGE, tokens=16)
        gains: list[tuple[float, bool]] = []
        network = Network(lambda noisy, *_: noisy)
        network.velocity = lambda noisy, *_, n=network, g=gains: (
            g.append((float(n.gain.detach()), torch.is_grad_enabled())) or noisy
        )
        made.losses(asked(network, teacher_gain=0.25), steps, None).sum().backward()
        assert gains == [(0.25, False)] * 5 + [(1.0, False), (1.0, True), (1.0, False), (1.0, False)]
        numbers.add(len(gains))
    assert numbers == {9}


def test_all_passes_drop_out_alike_and_what_comes_after_is_as_after_one_pass() -> None:
    made = objective(enhancedRatio="0.5")
    _, steps = prepared(made, 2)
    masks: list[Tensor] = []

    def velocity(noisy: Tensor, *_: Any) -> Tensor:
        masks.append(torch.rand(3))
        return noisy

    torch.manual_seed(5)
    made.losses(asked(Network(velocity)), steps, None)
    after = torch.rand(1)
    torch.manual_seed(5)
    one = torch.rand(3)
    assert torch.equal(after, torch.rand(1))
    assert len(masks) == 8
    assert all(torch.equal(mask, one) for mask in masks)


def test_what_is_masked_does_not_count() -> None:
    made, steps = objective(adversarial=False, rectifyWeight="0"), steps_of(0.6, 0.6)
    mask = torch.zeros(1, 1, 1, SHAPE[-1])
    mask[..., 0] = 1
    off = torch.zeros(SHAPE[-1])
    off[0], off[1] = 0.1, 0.7
    losses = made.losses(asked(Network(lambda *_: steps.target + off)), steps, mask)
    torch.testing.assert_close(losses, torch.full_like(losses, 0.1), rtol=1e-3, atol=0)


def test_without_a_teacher_context_nothing_is_swapped() -> None:
    """The trainer's network of other objectives is asked once, with gradient, and told nothing of steps."""
    made = build_objective(Objective(), FLOW, {})
    clean = torch.randn(2, *SHAPE)
    plain = made.prepare(clean, generators(2), stage=STAGE, tokens=16)
    network = Network(lambda noisy, *_: noisy)
    network.times = Times(plain.time, plain.time, plain.time < 0)
    asking = RunNetwork(Family(), (), bf16=False, device=torch.device("cpu"), averaged=nullcontext)  # type: ignore[arg-type]
    asking.denoiser, asking.conditions = network, CAPTION
    losses = made.losses(asking, plain, None)
    assert torch.equal(losses, made.loss(network.gain * plain.noisy, plain))
    assert [grad for _, grad, _, _ in network.passes] == [True]
