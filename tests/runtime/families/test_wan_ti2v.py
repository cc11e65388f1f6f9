"""Wan 2.2 TI2V-5B: the first latent is shown clean and at time 0, the loss leaves it out, and what is refused."""

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
from family_cases import Case, make_case, record
from family_models import save_tiny
from family_models.wan_ti2v import tiny_text_pipeline

FAMILY = get_family("wan_ti2v")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("wan_ti2v")


def inputs_of(case: Case, time: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """(latents, times) that reach the network."""
    seen: list[Any] = []
    handle = case.pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        FAMILY.predict(case.pipe.transformer, torch.full_like(case.latents(len(time)), 7.0), time, conditions)
    handle.remove()
    return seen[0][0], seen[0][1]


@pytest.mark.parametrize("per_token", [False, True], ids=["time of a sample", "time of a token"])
def test_the_first_latent_is_clean_and_at_time_zero(case: Case, per_token: bool) -> None:
    time = torch.tensor([0.3, 0.9])
    tokens = time[:, None].expand(-1, 4) if per_token else time
    latents, times = inputs_of(case, tokens, case.conditions(["a fox", "fog"]))
    torch.testing.assert_close(latents[:, :, :1], case.latents(2)[:, :, :1], atol=1e-5, rtol=1e-5)
    assert (latents[:, :, 1:] == 7).all()
    torch.testing.assert_close(times, torch.tensor([[0.0, 0.0, 300.0, 300.0], [0.0, 0.0, 900.0, 900.0]]))


def test_the_loss_leaves_out_the_latent_that_is_shown(case: Case) -> None:
    latents = case.latents(2)
    mask = FAMILY.loss_mask(latents, case.conditions(["a fox", "fog"]))
    assert mask is not None
    kept = mask.expand_as(latents)
    assert not kept[:, :, 0].any()
    assert (kept[:, :, 1:] == 1).all()


def test_noise_of_the_latent_that_is_shown_changes_nothing(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(1), [0.5])
    other = noisy.clone()
    other[:, :, 0] += 3
    told = case.conditions(["a fox"])
    with torch.no_grad():
        one, two = (FAMILY.predict(case.pipe.transformer, latents, time, told) for latents in (noisy, other))
    assert torch.equal(one, two)


@torch.no_grad()
def test_without_a_frame_the_prediction_is_that_of_the_pipeline_that_draws_from_text(case: Case) -> None:
    pipe = tiny_text_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipe.scheduler.step

    def spy(output: Tensor, t: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        outputs.append((output, t, sample))
        return step(output, t, sample, **kwargs)

    pipe.scheduler.step = spy
    size = {"width": 64, "height": 32, "num_frames": 5}
    pipe("a fox", **size, num_inference_steps=3, guidance_scale=1, output_type="latent")
    text = FAMILY.collate_text(FAMILY.encode_text(pipe, ["a fox"]))
    for output, t, sample in outputs:
        ours = FAMILY.predict(pipe.transformer, sample, t.expand(1) / 1000, Conditions(text, torch.zeros(1, 6)))
        torch.testing.assert_close(ours, output, atol=1e-5, rtol=1e-5)
    assert len(outputs) == 3
    assert FAMILY.loss_mask(outputs[0][2], Conditions(text, torch.zeros(1, 6))) is None


def test_the_checkpoint_as_it_is_published_is_sampled_from_a_picture(case: Case, tmp_path: Path) -> None:
    """Its index names the pipeline that draws from text alone."""
    save_tiny("wan_ti2v", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"_class_name": "WanPipeline"}
    published = {name: value for name, value in index.items() if not name.startswith("image_")}
    (tmp_path / "model_index.json").write_text(json.dumps(published))
    assert components.given_frames(FAMILY, tmp_path) == ("first",)
    denoisers = {"transformer": case.pipe.transformer}
    pipe = components.load_pipeline(FAMILY, tmp_path, torch.float32, torch.device("cpu"), denoisers=denoisers)
    arguments = FAMILY.sampling_arguments(pipe, case.request(None, steps=2))
    [ours, theirs] = (record(each, arguments | {"generator": torch.Generator()}) for each in (pipe, case.pipe))
    assert torch.equal(ours.after[-1], theirs.after[-1])


def test_a_checkpoint_of_one_time_for_all_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set spec\.model\.family to wan"):
        FAMILY.given_frames({"_class_name": "WanPipeline", "expand_timesteps": False}, {})
    with pytest.raises(ConfigError, match=r"set spec\.model\.family to wan"):
        FAMILY.stages({"_class_name": "WanPipeline"}, ("transformer",))
