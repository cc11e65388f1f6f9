"""LTX Video from a picture: the first latent is shown clean and at time 0, and the published checkpoint is sampled so, too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier_api.errors import ConfigError
from atelier_runtime import components
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions
from family_cases import PROMPTS, Case, make_case, record
from family_models import save_tiny

FAMILY = get_family("ltx_i2v")
LEVELS = (0.3, 0.9)
IN_A_FRAME = 6  # tokens of a latent frame


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("ltx_i2v")


@pytest.mark.parametrize("per_token", [False, True], ids=["time of a sample", "time of a token"])
@torch.no_grad()
def test_the_first_latent_is_shown_clean_and_at_time_zero_and_not_trained_as_text_to_video(
    case: Case, per_token: bool
) -> None:
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    time = torch.tensor(LEVELS)
    times = time[:, None].repeat(1, 2 * IN_A_FRAME) if per_token else time
    FAMILY.predict(case.pipe.transformer, torch.full_like(case.latents(2), 7.0), times, case.conditions(PROMPTS))
    handle.remove()
    [told] = seen
    tokens = told["hidden_states"].unflatten(1, (2, IN_A_FRAME))
    first = case.latents(2)[:, :, 0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, 0], first, atol=1e-5, rtol=1e-5)
    assert (tokens[:, 1] == 7).all()
    expected = torch.tensor([[0.0] * IN_A_FRAME + [1000 * level] * IN_A_FRAME for level in LEVELS])
    torch.testing.assert_close(told["timestep"], expected)


def test_the_loss_leaves_out_the_latent_that_is_shown(case: Case) -> None:
    latents = case.latents(2)
    mask = FAMILY.loss_mask(latents, case.conditions(PROMPTS))
    assert mask is not None
    kept = mask.expand_as(latents)
    assert not kept[:, :, 0].any()
    assert (kept[:, :, 1:] == 1).all()


@torch.no_grad()
def test_noise_of_the_latent_that_is_shown_changes_nothing(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(2), LEVELS)
    other = noisy.clone()
    other[:, :, 0] += 3
    told = case.conditions(PROMPTS)
    one, two = (FAMILY.predict(case.pipe.transformer, latents, time, told) for latents in (noisy, other))
    assert torch.equal(one, two)


@torch.no_grad()
def test_without_a_frame_the_prediction_is_that_from_text_alone(case: Case) -> None:
    told = Conditions(case.conditions(PROMPTS).text, torch.zeros(2, 6))
    noisy, time, _ = case.noised(case.latents(2), LEVELS)
    predictions = [get_family(name).predict(case.pipe.transformer, noisy, time, told) for name in ("ltx", "ltx_i2v")]
    assert torch.equal(*predictions)
    assert FAMILY.loss_mask(noisy, told) is None


@torch.no_grad()
def test_the_start_of_the_pipeline_is_the_latent_that_is_trained(case: Case) -> None:
    """Up to the posterior's deviation, from which the pipeline draws."""
    expected = case.conditions(PROMPTS[:1]).frames
    assert expected is not None
    pixels = case.pixels(1)
    size = {"height": pixels.shape[-2], "width": pixels.shape[-1], "num_frames": pixels.shape[2]}
    packed, shown = case.pipe.prepare_latents(
        pixels[:, :, 0], 1, **size, dtype=torch.float32, device="cpu", generator=torch.Generator()
    )
    start: Tensor = case.tiny.to_grid(case.pipe, packed)
    torch.testing.assert_close(start[:, :, :1], expected["first"], atol=1e-4, rtol=1e-4)
    assert shown[0].tolist() == [1.0] * IN_A_FRAME + [0.0] * IN_A_FRAME


@torch.no_grad()
def test_the_checkpoint_as_it_is_published_is_sampled_from_a_picture(case: Case, tmp_path: Path) -> None:
    """Its index names the pipeline that draws from text alone."""
    save_tiny("ltx_i2v", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"_class_name": "LTXPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert components.given_frames(FAMILY, tmp_path) == ("first",)
    denoisers = {"transformer": case.pipe.transformer}
    pipe = components.load_pipeline(FAMILY, tmp_path, torch.float32, torch.device("cpu"), denoisers=denoisers)
    pipe.set_progress_bar_config(disable=True)
    arguments = FAMILY.sampling_arguments(pipe, case.request(None, steps=2))
    [ours, theirs] = (record(each, arguments | {"generator": torch.Generator()}) for each in (pipe, case.pipe))
    assert torch.equal(ours.after[-1], theirs.after[-1])


def test_a_clip_of_which_every_frame_is_shown_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"spec\.data\.clip\.frames is 1, .* must be 9 or more"):
        FAMILY.encode_frames(case.pipe, case.pixels(1)[:, :, :1], case.given)


def test_checkpoints_that_place_their_frames_otherwise_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXConditionPipeline"}')
    with pytest.raises(
        ConfigError, match=r"trains checkpoints of LTXPipeline, LTXImageToVideoPipeline, but .* is a LTXCond"
    ):
        components.given_frames(FAMILY, tmp_path)
