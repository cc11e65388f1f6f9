"""LTX Video: its text mask, its positions in seconds, a time per token, and the checkpoints it leaves to another pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from atelier_api.errors import ConfigError
from atelier_runtime import components
from atelier_runtime.families import get_family
from family_cases import PROMPTS, Case, make_case, record, sampling_arguments, walk

FAMILY = get_family("ltx")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("ltx")


@torch.no_grad()
def test_a_schedule_that_ends_above_zero_is_followed_as_well() -> None:
    """Published checkpoints stretch the schedule to end at 0.1: a matter of the sampler alone."""
    case = make_case("ltx")
    case.pipe.register_modules(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        )
    )
    recording = record(case.pipe, sampling_arguments(case, guided=True))
    assert case.pipe.scheduler.sigmas[-2].item() == pytest.approx(0.1)
    for ours, theirs in walk(case, recording, guided=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_is_encoded_among_the_padding_of_128_tokens_and_stored_without_it(case: Case) -> None:
    embeds, mask, _, _ = case.pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert embeds.shape[1] == 128
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    assert [len(item["embeds"]) for item in features] == mask.sum(dim=1).tolist()
    for item, row in zip(features, embeds, strict=True):
        assert torch.equal(item["embeds"], row[: len(item["embeds"])])
    alone = case.pipe.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert not torch.allclose(case.pipe.text_encoder(alone)[0][0], features[0]["embeds"], atol=1e-4)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_count(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    expected = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    embeds, mask = conditions.text["embeds"], conditions.text["mask"]
    assert not mask.all()
    other = replace(conditions, text={"embeds": torch.where(mask[..., None], embeds, 7.0), "mask": mask})
    assert torch.equal(FAMILY.predict(case.pipe.transformer, noisy, time, other), expected)


@torch.no_grad()
def test_the_frame_rate_places_the_frames_in_time(case: Case) -> None:
    recordings = [record(case.pipe, sampling_arguments(case, guided=False) | {"frame_rate": rate}) for rate in (25, 12)]
    assert not torch.equal(recordings[0].after[0], recordings[1].after[0])
    assert recordings[1].start is not None
    start = case.tiny.to_grid(case.pipe, recordings[1].start)
    conditions = replace(case.conditions(PROMPTS[:1]), frame_rate=12.0)
    prediction = FAMILY.predict(case.pipe.transformer, start, torch.ones(1), conditions)
    sigmas = case.pipe.scheduler.sigmas
    after = start + (sigmas[1] - sigmas[0]) * prediction
    torch.testing.assert_close(after, case.tiny.to_grid(case.pipe, recordings[1].after[0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_time_for_each_token_is_that_of_the_sample_where_all_are_equal(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    of_samples = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    of_tokens = time[:, None].repeat(1, noisy[0, 0].numel())
    torch.testing.assert_close(FAMILY.predict(case.pipe.transformer, noisy, of_tokens, conditions), of_samples)
    of_tokens[:, 0] = 0.0
    assert not torch.allclose(FAMILY.predict(case.pipe.transformer, noisy, of_tokens, conditions), of_samples)


def test_checkpoints_that_place_their_frames_otherwise_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXConditionPipeline"}')
    with pytest.raises(ConfigError, match=r"trains checkpoints of LTXPipeline, but .* is a LTXConditionPipeline"):
        components.denoiser_names(FAMILY, tmp_path)
