"""A few-step generator on every family: the base at its start, told a step's end as it is told the time, drawing in even steps."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_runtime.families import FAMILIES
from atelier_runtime.family import TimeEmbedder
from atelier_runtime.few_steps import FewSteps, Times, few_step_sampling
from family_cases import CASES, PROMPTS, Case
from family_models import FAMILY_OF
from shared_cases import shared_case

pytestmark = [pytest.mark.cell("twinflow"), pytest.mark.sweep]

STARTS = torch.tensor([0.9, 0.4])
ENDS = torch.tensor([0.25, 0.1])
POSITIVE = torch.tensor([False, False])
SHOWN = ("longcat_video_edit", "longcat_video_continued", "ltx_i2v", "qwen_image_edit_2511", "wan_ti2v")
"""Pipelines whose network is told time 0 of what it is shown beside the noise."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    family = FAMILIES[FAMILY_OF[request.param]]
    if family.facts.objective == "diffusion":
        pytest.skip("its network predicts no velocity")
    made = shared_case(request.param)
    if len(made.denoisers) > 1:
        pytest.skip("its checkpoint has two networks, and is refused")
    return made


def put_on(case: Case) -> tuple[nn.Module, FewSteps, TimeEmbedder]:
    """A denoiser of its own, with what tells it of steps."""
    where = case.family.time_embedder
    assert where is not None
    [denoiser] = copy.deepcopy(case.denoisers).values()
    steps = FewSteps(denoiser, where)
    steps.put_on(denoiser, torch.float32)
    return denoiser.eval(), steps, where


@contextmanager
def seen(module: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module inside."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    yield kept
    handle.remove()


@contextmanager
def made(module: nn.Module) -> Iterator[list[Tensor]]:
    """What comes out of a module inside, of several parts the first."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    yield kept
    handle.remove()


def at_zero(given: Sequence[Tensor], steps: FewSteps) -> Tensor:
    """For each row of what is `given` to an embedder, whether it is what sigma 0 gives."""
    clean = steps._entering(torch.zeros(1))
    return torch.cat([(each.reshape(-1, clean[0].numel()) == clean.reshape(1, -1)).all(1) for each in given])


@torch.no_grad()
def test_the_end_of_a_step_enters_as_the_network_is_told_that_noise_level(case: Case) -> None:
    denoiser, steps, where = put_on(case)
    noisy, _, _ = case.noised(case.latents(2), STARTS.tolist())
    conditions = case.conditions(PROMPTS)
    with seen(denoiser.get_submodule(where.module)) as expected:
        case.family.predict(denoiser, noisy, ENDS, conditions)
    with seen(steps.embedder) as found, steps.telling(Times(STARTS, ENDS, POSITIVE)):
        case.family.predict(denoiser, noisy, STARTS, conditions)
    noisy_rows = ~at_zero(expected, steps)
    [once] = found if where.rows != "sample" else [torch.cat(found)]
    rows = torch.cat([each.reshape(-1, *once.shape[1:]) for each in expected])[noisy_rows]
    each = len(rows) // len(once)
    assert each == 1 or where.rows == "parts"
    torch.testing.assert_close(once.repeat_interleave(each, 0), rows, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_shown_beside_the_noise_is_told_nothing_of_the_step(case: Case) -> None:
    denoiser, steps, where = put_on(case)
    steps.negative.normal_()
    noisy, _, _ = case.noised(case.latents(2), STARTS.tolist())
    conditions, embedder = case.conditions(PROMPTS), denoiser.get_submodule(where.module)
    with made(embedder) as base, seen(embedder) as given:
        case.family.predict(denoiser, noisy, STARTS, conditions)
    with made(embedder) as told, steps.telling(Times(STARTS, ENDS, ~POSITIVE)):
        case.family.predict(denoiser, noisy, STARTS, conditions)
    shown = at_zero(given, steps)
    before, after = (torch.cat([each.flatten(0, -2) for each in outputs]) for outputs in (base, told))
    before, after = (each.reshape(len(shown), -1) for each in (before, after))
    assert torch.equal((before == after).all(1), shown)
    assert bool(shown.any()) == (case.name in SHOWN)


@torch.no_grad()
def test_with_trained_weights_an_empty_step_is_the_base_and_a_real_or_a_negative_one_is_not(case: Case) -> None:
    denoiser, steps, _ = put_on(case)
    noisy, _, _ = case.noised(case.latents(2), STARTS.tolist())
    conditions = case.conditions(PROMPTS)

    def predicted(times: Times) -> Tensor:
        with steps.telling(times):
            return case.family.predict(denoiser, noisy, times.start, conditions)

    base = case.family.predict(denoiser, noisy, STARTS, conditions)
    assert torch.equal(predicted(Times(STARTS, STARTS, ~POSITIVE)), base)  # at the start the sign says nothing
    steps.negative.normal_()
    assert torch.equal(predicted(Times(STARTS, STARTS, POSITIVE)), base)
    one = predicted(Times(STARTS, torch.tensor([0.25, 0.4]), POSITIVE))
    changed = (one != base).flatten(1).any(1)
    assert changed.tolist() == [True, False]
    other = predicted(Times(STARTS, STARTS, torch.tensor([False, True])))
    assert (other != base).flatten(1).any(1).tolist() == [False, True]


@torch.no_grad()
@pytest.mark.parametrize(("base", "trained"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_it_trains_in_another_precision_than_the_network_has(case: Case, base: str, trained: str) -> None:
    denoiser, steps, where = put_on(case)
    noisy, _, _ = case.noised(case.latents(2), STARTS.tolist())
    conditions = case.conditions(PROMPTS)
    steps.negative.normal_()
    times = Times(STARTS, ENDS, ~POSITIVE)
    with steps.telling(times):
        exact = case.family.predict(denoiser, noisy, STARTS, conditions)
    denoiser.to(getattr(torch, base))
    assert FewSteps(denoiser, where).negative.shape == steps.negative.shape
    steps.to(getattr(torch, trained))
    with torch.autocast("cpu", torch.bfloat16, enabled=base == "bfloat16"), steps.telling(times):
        found = case.family.predict(denoiser, noisy, STARTS, conditions)
    assert (found - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_the_stock_pipeline_draws_by_even_steps_of_the_average_velocity(case: Case) -> None:
    """Its own denoiser is asked: what it is given and what it gives are one Euler step apart, and the first is at the noise."""
    denoiser, steps, where = put_on(case)
    steps.negative.normal_()
    name = case.family.denoisers[0]
    given = getattr(case.pipe, name)
    setattr(case.pipe, name, denoiser)
    told: list[Times] = []
    steps.embedder.register_forward_pre_hook(lambda *_: told.append(steps._times))
    try:
        request = replace(case.request(case.family.facts.guidance_above, steps=2), even_steps=True)
        arguments = case.family.sampling_arguments(case.pipe, request)
        with few_step_sampling(case.pipe, denoiser), seen(denoiser.get_submodule(where.module)) as entered:
            case.pipe(**arguments)
    finally:
        setattr(case.pipe, name, given)
    most = case.pipe.scheduler.config.get("sigma_max")  # of those that count noise as a multiple of the picture
    first = most / (1 + most) if most else 1.0
    assert [float(each.start) for each in told] == pytest.approx([first, first / 2])
    assert [float(each.end) for each in told] == pytest.approx([first / 2, 0])
    for given, level in zip(entered, (first, first / 2), strict=True):
        expected = steps._entering(torch.tensor([level]))
        rows = given.reshape(-1, *expected.shape[1:])[~at_zero([given], steps)].float()
        torch.testing.assert_close(rows, expected.expand_as(rows), atol=2e-4, rtol=1e-4)
