"""LongCat-Video that goes on from a picture or a clip: what is shown, where it counts, its pipeline, and runs that continue clips."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.validation import Validation, ValidationPrompt
from atelier_runtime.data import MicroBatch, build_dataset
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions
from atelier_runtime.parallel import Distributed
from atelier_runtime.prompt_pictures import prompt_pictures
from atelier_runtime.sampling import draw_samples
from atelier_runtime.usage import usage
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny
from tiny_data import OneRank, all_samples, grey_frames, no_report, picture, training_run_file, write_clip

FAMILY = get_family("longcat_video_edit")
LEVELS = (0.3, 0.9)
LORA = "exports/diffusers/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=["longcat_video_edit", "longcat_video_continued"])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def shown_latents(case: Case) -> int:
    return (case.tiny.shown - 1) // 4 + 1


def predicted(case: Case, conditions: Conditions, noisy: Tensor | None = None) -> Tensor:
    ours, time, _ = case.noised(case.latents(2), LEVELS)
    return FAMILY.predict(case.pipe.dit, ours if noisy is None else noisy, time, conditions)


@torch.no_grad()
def test_what_is_shown_is_inserted_clean_and_at_time_zero_and_not_trained_as_text_to_video(case: Case) -> None:
    seen: list[Any] = []
    handle = case.pipe.dit.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    predicted(case, case.conditions(PROMPTS), torch.full_like(case.latents(2), 7.0))
    handle.remove()
    [((latents, times, *_), told)] = seen
    k, frames = shown_latents(case), latents.shape[2]
    assert told["num_cond_latents"] == k < frames
    torch.testing.assert_close(latents[:, :, :k], case.latents(2)[:, :, :k], atol=1e-5, rtol=1e-5)
    assert (latents[:, :, k:] == 7).all()
    torch.testing.assert_close(times, torch.tensor([[0.0] * k + [1000 * level] * (frames - k) for level in LEVELS]))


@torch.no_grad()
def test_what_is_shown_changes_the_prediction_of_its_own_sample_only(case: Case) -> None:
    k = shown_latents(case)
    ours, other = (predicted(case, case.conditions(PROMPTS, samples=samples))[:, :, k:] for samples in ([0, 0], [0, 1]))
    torch.testing.assert_close(ours[0], other[0], atol=1e-6, rtol=1e-6)
    assert (ours[1] - other[1]).abs().max() > 1e-4


@torch.no_grad()
def test_noise_of_the_latents_that_are_shown_changes_nothing(case: Case) -> None:
    conditions = case.conditions(PROMPTS)
    noisy, _, _ = case.noised(case.latents(2), LEVELS)
    other = noisy.clone()
    other[:, :, : shown_latents(case)] += 3
    assert torch.equal(predicted(case, conditions), predicted(case, conditions, other))


@torch.no_grad()
def test_what_is_shown_sees_neither_the_text_nor_what_is_drawn(case: Case) -> None:
    k = shown_latents(case)
    noisy, _, _ = case.noised(case.latents(2), LEVELS)
    one = predicted(case, case.conditions(PROMPTS))
    other = predicted(case, case.conditions(PROMPTS[::-1], samples=[0, 1]), noisy + 1)
    torch.testing.assert_close(one[:, :, :k], other[:, :, :k], atol=1e-6, rtol=1e-6)
    assert ((one - other)[:, :, k:].abs().amax(dim=(1, 2, 3, 4)) > 1e-4).all()


def test_the_loss_leaves_out_the_latents_that_are_shown(case: Case) -> None:
    latents, k = case.latents(2), shown_latents(case)
    mask = FAMILY.loss_mask(latents, case.conditions(PROMPTS))
    assert mask is not None
    kept = mask.expand_as(latents)
    assert not kept[:, :, :k].any()
    assert (kept[:, :, k:] == 1).all()


@torch.no_grad()
def test_without_frames_the_prediction_is_that_from_text_alone(case: Case) -> None:
    told = Conditions(case.conditions(PROMPTS).text, torch.zeros(2, 6))
    noisy, time, _ = case.noised(case.latents(2), LEVELS)
    expected = get_family("longcat_video").predict(case.pipe.dit, noisy, time, told)
    assert torch.equal(predicted(case, told), expected)
    assert FAMILY.loss_mask(noisy, told) is None


# --- the pipeline -----------------------------------------------------------------------------------------------------


def drawn(case: Case, **arguments: Any) -> Tensor:
    size = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    return case.pipe("a fox", **size | arguments, generator=generator, output_type="latent").frames


@torch.no_grad()
def test_a_clip_begins_with_the_picture_brought_to_its_size() -> None:
    case = make_case("longcat_video_edit")
    start = picture(96, 96)
    small = start.resize((64, 32), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    latents = drawn(case, image=start)
    expected = FAMILY.encode_pixels(case.pipe, pixels).mean
    torch.testing.assert_close(latents[:, :, :1], expected, atol=1e-5, rtol=1e-5)
    assert (drawn(case)[:, :, 1:] - latents[:, :, 1:]).abs().max() > 1e-4


@torch.no_grad()
def test_a_clip_is_continued_from_its_last_pictures() -> None:
    case = make_case("longcat_video_continued")
    clip = [picture(64, 32, seed) for seed in range(7)]
    end = torch.from_numpy(np.stack([np.array(each) for each in clip[-5:]])).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = drawn(case, video=clip, num_cond_frames=5)
    torch.testing.assert_close(latents[:, :, :2], FAMILY.encode_pixels(case.pipe, end).mean, atol=1e-5, rtol=1e-5)
    assert torch.equal(latents, drawn(case, video=clip[-5:], num_cond_frames=5))
    assert latents.shape == (1, 16, 3, 4, 8)


def test_the_lower_half_of_a_continued_clips_noise_goes_in_even_steps() -> None:
    pipe = make_case("longcat_video_continued").pipe
    clip = [picture(64, 32)] * 5
    schedules = []
    for tail in (False, True):
        case_arguments = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 50, "guidance_scale": 1.0}
        pipe("a", **case_arguments, video=clip, num_cond_frames=5, uniform_tail=tail, output_type="latent")
        schedules.append(pipe.scheduler.sigmas.clone())
    even, tailed = schedules
    assert len(even) == 50 + 1
    kept = even[even > 0.5]
    assert len(kept) < 50
    halves = torch.arange(10, -1, -1) * 0.05
    torch.testing.assert_close(tailed, torch.cat([kept, halves]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"image": picture(64, 32), "video": [picture(64, 32)]}, "both image and video"),
        ({"video": [picture(64, 32)] * 6, "num_cond_frames": 6}, "num_cond_frames is 6"),
        ({"video": [picture(64, 32)] * 9, "num_cond_frames": 9}, "less than num_frames, which is 9"),
        ({"video": [picture(64, 32)] * 4, "num_cond_frames": 5}, "video has 4 pictures"),
        ({"image": picture(64, 32), "num_frames": 1}, "less than num_frames, which is 1"),
    ],
    ids=["both", "between latents", "nothing left to draw", "too few", "nothing but the picture"],
)
def test_what_cannot_be_continued_is_refused(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        drawn(make_case("longcat_video_continued"), **arguments)


# --- runs -------------------------------------------------------------------------------------------------------------


def run_over(folder: Path, shown: int, **prompt: Any) -> RunFile:
    """A run that shows as many first frames, with samples of 48 x 32 pixels."""
    base = folder / "base"
    if not base.exists():
        save_tiny("longcat_video_edit", base)
    clip = {"frames": 9, "shownFrames": shown}
    file = training_run_file(
        folder, [folder / "clips"], base, "longcat_video_edit", data={"clip": clip, "maxUpscale": 4}
    )
    prompts = [ValidationPrompt(text="a fox", **prompt)] if prompt else []
    validation = Validation(prompts=prompts, width=48, height=32, frames=9, steps=1)
    return file.model_copy(update={"spec": file.spec.model_copy(update={"validation": validation})})


def greys(path: Path, *values: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_clip(path, grey_frames(list(values)), 15)


def test_the_cache_keeps_as_many_first_frames_as_the_run_says(tmp_path: Path) -> None:
    greys(tmp_path / "clips/a.mp4", *range(10, 190, 20)).with_suffix(".txt").write_text("a fox")

    def sample(shown: int) -> MicroBatch:
        [only] = all_samples(build_dataset(run_over(tmp_path, shown), FAMILY, OneRank(), no_report)).values()
        return only

    first, five = sample(1), sample(5)
    assert first.frames is not None
    assert five.frames is not None
    assert torch.equal(first.latents, five.latents)
    for batch, latents in ((first, 1), (five, 2)):
        torch.testing.assert_close(batch.frames["first"], batch.latents[:, :, :latents], atol=1e-5, rtol=1e-5)


def test_a_sample_continues_the_first_frames_of_its_clip(tmp_path: Path) -> None:
    start = greys(tmp_path / "start.mp4", 20, 60, 100, 140, 180, 220)
    file = run_over(tmp_path, 5, image=str(start))
    [given] = prompt_pictures(file, FAMILY)
    assert [frame.size for frame in given.frames] == [(48, 32)] * 5
    means = [np.asarray(frame).mean() for frame in given.frames]
    assert means == pytest.approx([20, 60, 100, 140, 180], abs=3)
    case, here = make_case("longcat_video_continued"), Distributed(0, 0, 1, torch.device("cpu"))
    before = draw_samples(file, FAMILY, case.denoisers, here)
    greys(start, 220, 180, 140, 100, 60, 20)
    assert draw_samples(file, FAMILY, case.denoisers, here) != before


def test_a_clip_too_short_to_continue_is_refused(tmp_path: Path) -> None:
    file = run_over(tmp_path, 5, image=str(greys(tmp_path / "start.mp4", 20, 60, 100)))
    expected = r"image is .*start\.mp4', which cannot be read as a clip \(3 frames at 15 per second instead of 5\)"
    with pytest.raises(ConfigError, match=expected):
        prompt_pictures(file, FAMILY)


def test_the_report_says_how_to_draw_from_a_picture_and_from_a_clip(tmp_path: Path) -> None:
    last = {shown: usage(run_over(tmp_path, shown), FAMILY, [LORA]).splitlines()[-1] for shown in (1, 5)}
    assert last == {
        1: 'export_to_video(pipe(prompt="your prompt", image=load_image("image.png"))[0][0], "clip.mp4", fps=15)',
        5: 'export_to_video(pipe(prompt="your prompt", video=load_video("start.mp4"), num_cond_frames=5)[0][0], "clip.mp4", fps=15)',
    }
