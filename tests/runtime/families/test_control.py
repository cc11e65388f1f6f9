"""Control networks: what is trained is what the stock pipeline samples with, the same asked of each family that can have one."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from atelier_api.families import NAMES
from atelier_runtime import adapters
from atelier_runtime.families import FAMILIES
from control_cases import CONTROLLED, ControlledCase, condition_of, control_network, controlled_case
from family_cases import PROMPTS, record, sampling_arguments, walk
from shared_cases import shared_case

LEVELS = (0.3, 0.9)
STEP = 1e-2
"""Distance along which a slope is measured."""
NEW = {
    *("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"),
    *("controlnet_x_embedder", "controlnet_blocks", "controlnet_single_blocks", "pos_embed_input"),
}
"""What a network has beside its copy of the base."""
ONE_FOR_BOTH = ("FluxControlNetPipeline", "FluxKontextControlNetPipeline", "QwenImageControlNetPipeline")
"""Pipelines that give the negative prompt the network's outputs for the positive one."""

pytestmark = pytest.mark.cell("controlnet")


@pytest.fixture(scope="module", params=CONTROLLED)
def case(request: pytest.FixtureRequest) -> ControlledCase:
    """Shared by the tests that change no weight."""
    return controlled_case(request.param, trained=True)


@pytest.fixture(params=CONTROLLED)
def fresh(request: pytest.FixtureRequest) -> ControlledCase:
    return controlled_case(request.param, trained=False)


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are the mean of their posterior: pipelines draw those of the conditioning picture, some with torch's own generator."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mean)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_has_a_network_or_a_reason_why_it_has_none(name: str) -> None:
    family = FAMILIES[name]
    sizes = {bool(flavour.control_parameters and flavour.control_layers) for flavour in family.facts.flavours}
    assert sizes == {family.control is not None}
    assert bool(family.facts.uncontrolled) == (family.control is None)
    if family.control is None:
        assert not family.facts.control_pixels
        pytest.skip(family.facts.uncontrolled)
    assert family.facts.control_pixels == (family.control.takes == "pixels")


def predicted(case: ControlledCase, samples: list[int]) -> Tensor:
    """For two real samples with the same two prompts and the conditioning pictures of these numbers."""
    noisy, time, _ = case.noised(case.latents(2), LEVELS)
    told = replace(case.conditions(PROMPTS), control=case.condition(samples))
    return case.family.predict(case.together, noisy, time, told)


def test_at_its_start_the_network_changes_no_bit(fresh: ControlledCase) -> None:
    noisy, time, _ = fresh.noised(fresh.latents(2), LEVELS)
    alone = fresh.family.predict(fresh.base, noisy, time, replace(fresh.conditions(PROMPTS), control=None))
    assert torch.equal(predicted(fresh, [0, 1]), alone)


def test_the_network_is_a_copy_of_the_base_and_leaves_its_config_alone(fresh: ControlledCase) -> None:
    base = fresh.base.state_dict()
    network = {named_as_in_the_base(name): weight for name, weight in fresh.network.state_dict().items()}
    assert network.keys() & base.keys()
    untouched = next(iter(shared_case(fresh.name).denoisers.values()))
    assert dict(fresh.base.config) == dict(untouched.config)  # type: ignore[arg-type]
    assert {name.split(".")[0] for name in network.keys() - base.keys()} <= NEW
    assert all(torch.equal(network[name], base[name]) for name in network.keys() & base.keys())


def named_as_in_the_base(name: str) -> str:
    """PixArt's published network has its copies between layers of its own."""
    return re.sub(r"controlnet_blocks\.(\d+)\.transformer_block\.", r"transformer_blocks.\1.", name)


def test_every_trained_weight_of_the_network_gets_a_gradient_and_none_of_the_base(fresh: ControlledCase) -> None:
    network = control_network(fresh, trained=True)
    case = replace(fresh, network=network)
    noisy, time, target = case.noised(case.latents(2), LEVELS)
    prediction = case.family.predict(case.together, noisy, time, case.conditions(PROMPTS))
    (prediction - target).square().mean().backward()
    trained = adapters.trainable(network)
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    frozen = [(name, parameter) for name, parameter in network.named_parameters() if name not in trained]
    assert [name for name, parameter in [*frozen, *case.base.named_parameters()] if parameter.grad is not None] == []


def test_the_gradient_is_the_slope_of_the_loss(fresh: ControlledCase) -> None:
    """Nothing in the base or in the network stops a part of it: some layers let none through but in training mode."""
    case = replace(fresh, network=control_network(fresh, trained=True))
    noisy, time, target = case.noised(case.latents(2), LEVELS)
    conditions = case.conditions(PROMPTS)

    def loss() -> Tensor:
        return (case.family.predict(case.together, noisy, time, conditions) - target).square().mean()

    trained = list(adapters.trainable(case.network).values())
    slopes = torch.autograd.grad(loss(), trained)
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    losses = []
    with torch.no_grad():
        for step in (-STEP, 2 * STEP):
            for weight, slope in zip(trained, slopes, strict=True):
                weight += step * slope / length
            losses.append(loss())
    torch.testing.assert_close((losses[1] - losses[0]) / (2 * STEP), length, rtol=0.02, atol=0)


@torch.no_grad()
def test_what_is_frozen_in_the_network_changes_nothing(case: ControlledCase) -> None:
    changed = control_network(case, trained=True)
    for parameter in changed.parameters():
        if not parameter.requires_grad:
            nn.init.normal_(parameter)
    other = predicted(replace(case, network=changed), [0, 1])
    torch.testing.assert_close(other, predicted(case, [0, 1]), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_condition_changes_the_prediction_of_its_own_sample_only(case: ControlledCase) -> None:
    ours, other = predicted(case, [0, 0]), predicted(case, [0, 1])
    torch.testing.assert_close(ours[0], other[0], atol=1e-6, rtol=1e-6)
    assert (ours[1] - other[1]).abs().max() > 1e-4


@torch.no_grad()
def test_a_batch_of_two_equals_the_two_alone(case: ControlledCase) -> None:
    noisy, time, _ = case.noised(case.latents(2), LEVELS)
    alone = [
        case.family.predict(
            case.together, noisy[i : i + 1], time[i : i + 1], case.conditions([PROMPTS[i]], samples=[i])
        )
        for i in (0, 1)
    ]
    torch.testing.assert_close(predicted(case, [0, 1]), torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@torch.no_grad()
def test_sampling_with_the_network_follows_the_stock_pipeline_step_by_step(
    case: ControlledCase, certain: None, guided: bool
) -> None:
    if guided and case.control.pipeline in ONE_FOR_BOTH:
        pytest.skip("the pipeline gives the negative prompt the network's outputs for the positive one")
    recording = record(case.pipe, sampling_arguments(case, guided=guided))
    assert len(recording.after) == case.tiny.steps
    for ours, theirs in walk(case, recording, guided=guided):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.std())), rtol=1e-5)


@torch.no_grad()
def test_the_scale_of_a_prompt_is_how_much_of_the_network_counts(case: ControlledCase, certain: None) -> None:
    drawn = {}
    for scale in (0.0, 0.5, 1.0):
        request = replace(case.request(case.tiny.guidance_off, steps=2), condition_scale=scale)
        drawn[scale] = case.pipe(**case.family.sampling_arguments(case.pipe, request), output_type="pt")[0]
    base = shared_case(case.name)
    plain = base.family.sampling_arguments(base.pipe, base.request(case.tiny.guidance_off, steps=2))
    torch.testing.assert_close(drawn[0.0], base.pipe(**plain, output_type="pt")[0], atol=1e-5, rtol=1e-5)
    assert (drawn[1.0] - drawn[0.5]).abs().max() > 1e-3
    assert (drawn[0.5] - drawn[0.0]).abs().max() > 1e-3


def test_recomputing_activations_changes_neither_loss_nor_gradients(fresh: ControlledCase) -> None:
    case = replace(fresh, network=control_network(fresh, trained=True))
    noisy, time, target = case.noised(case.latents(2), LEVELS)
    conditions = case.conditions(PROMPTS)
    results = []
    for recompute in (False, True):
        case.network.zero_grad()
        if recompute:
            case.network.enable_gradient_checkpointing()  # type: ignore[operator]
            case.base.enable_gradient_checkpointing()  # type: ignore[operator]
        loss = (case.family.predict(case.together, noisy, time, conditions) - target).square().mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in adapters.trainable(case.network).items()}
        results.append((loss.detach(), {name: each.clone() for name, each in gradients.items() if each is not None}))
    (loss_off, gradients_off), (loss_on, gradients_on) = results
    assert torch.equal(loss_off, loss_on)
    assert gradients_off.keys() == gradients_on.keys()
    for name, gradient in gradients_off.items():
        torch.testing.assert_close(gradient, gradients_on[name], atol=1e-7, rtol=1e-5, msg=name)


def test_trained_on_four_pictures_the_condition_chooses_among_them(fresh: ControlledCase) -> None:
    """One prompt, one time and one noisy input for all: nothing but the condition tells them apart."""
    with torch.no_grad():
        clean = fresh.family.encode_pixels(fresh.pipe, fresh.pixels(4)[..., :16, :32]).mean.float()
    noisy, time, target = of_one_input(fresh, as_if_trained(clean))
    colours = [Image.new("RGB", (32, 16), colour) for colour in ("red", "lime", "blue", "white")]
    condition = condition_of(fresh, colours)
    if fresh.control.takes == "latents":
        condition = as_if_trained(condition)
    sizes = torch.tensor([[16, 32, 0, 0, 16, 32]] * 4)
    told = replace(fresh.conditions(["a picture"] * 4, samples=[0] * 4), sizes=sizes)

    def loss(condition: Tensor) -> Tensor:
        prediction = fresh.family.predict(fresh.together, noisy, time, replace(told, control=condition))
        return (prediction - target).square().mean()

    fresh.network.train()
    optimizer = torch.optim.AdamW(adapters.trainable(fresh.network).values(), lr=5e-3, weight_decay=0.0, fused=True)
    before = after = exchanged = loss(condition).item()
    for _ in range(5):
        if after < 0.8 * before and after < 0.92 * exchanged:
            break
        for _ in range(9):
            loss(condition).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            after, exchanged = loss(condition).item(), loss(condition.roll(1, 0)).item()
    assert after < 0.8 * before
    assert after < 0.92 * exchanged


def as_if_trained(latents: Tensor) -> Tensor:
    """As far apart as the latents of a trained autoencoder are: those of a random one are nearly equal."""
    axes = (0, 2, 3)
    return (latents - latents.mean(axes, keepdim=True)) / latents.std(axes, keepdim=True)


def of_one_input(case: ControlledCase, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy, time, target) of four pictures, each with the noise that makes the same noisy latents of it, at half the noise."""
    noisy = (0.3 * torch.randn(clean[:1].shape, generator=torch.Generator().manual_seed(0))).expand_as(clean)
    if case.family.facts.objective == "flow":
        return noisy, torch.full((4,), 0.5), (noisy - clean) / 0.5
    kept = case.pipe.scheduler.alphas_cumprod[500]
    return noisy, torch.full((4,), 500), (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
