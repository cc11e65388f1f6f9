"""Families that train on pairs: what a reference does to the prediction, the same asked of each."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atelier_runtime.families import FAMILIES
from family_cases import CASES, PROMPTS, Case, make_case
from family_models import FAMILY_OF


@pytest.fixture(scope="module", params=[name for name in CASES if FAMILIES[FAMILY_OF[name]].facts.references])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def predicted(case: Case, pictures: list[int], levels: tuple[float, ...] = (0.3, 0.9)) -> Tensor:
    """For real samples with the same two prompts and these references."""
    noisy, time, _ = case.noised(case.latents(len(levels)), levels)
    denoiser = next(iter(case.denoisers.values()))
    return case.family.predict(denoiser, noisy, time, case.conditions(PROMPTS[: len(levels)], samples=pictures))


@pytest.mark.cell("conditions")
@torch.no_grad()
def test_the_reference_changes_the_prediction_of_its_own_sample_only(case: Case) -> None:
    ours, other = predicted(case, [0, 0]), predicted(case, [0, 1])
    torch.testing.assert_close(ours[0], other[0], atol=1e-6, rtol=1e-6)
    assert (ours[1] - other[1]).abs().max() > 1e-5


@torch.no_grad()
def test_each_reference_among_the_tokens_changes_the_prediction(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(1), (0.9,))
    denoiser, told = next(iter(case.denoisers.values())), case.conditions(PROMPTS[:1])
    expected = case.family.predict(denoiser, noisy, time, told)
    assert len(told.references) == case.tiny.references
    for place in range(len(told.references)):
        others = [-each if place == number else each for number, each in enumerate(told.references)]
        changed = case.family.predict(denoiser, noisy, time, replace(told, references=tuple(others)))
        assert (changed - expected).abs().max() > 1e-5


@torch.no_grad()
def test_text_that_sees_the_references_is_another_for_each(case: Case) -> None:
    family, pipe = case.family, case.pipe
    if not family.text_sees_references:
        pytest.skip("its text encoder sees no pictures")
    shown, others = case.references(0), case.references(1)
    [expected] = family.encode_instructions(pipe, PROMPTS[:1], [shown])
    for place in range(len(shown)):
        changed = [others[place] if place == number else each for number, each in enumerate(shown)]
        [features] = family.encode_instructions(pipe, PROMPTS[:1], [changed])
        assert (features["embeds"] - expected["embeds"]).abs().max() > 1e-4


@torch.no_grad()
def test_the_prediction_is_the_targets_alone(case: Case) -> None:
    assert predicted(case, [0, 1]).shape == case.latents(2).shape


@torch.no_grad()
def test_references_are_encoded_without_chance(case: Case) -> None:
    once, twice = (case.reference_latents([case.references(0)[0]]) for _ in range(2))
    assert torch.equal(once, twice)


def test_references_have_sizes_that_the_autoencoder_and_the_patches_divide(case: Case) -> None:
    for width, height in ((1, 4000), (4000, 1), (333, 777), (1024, 1024)):
        for resolution in (16, 500, 1024):
            size = case.family.reference_size(width, height, resolution)
            assert all(side > 0 and side % case.family.facts.pixel_multiple == 0 for side in size)
