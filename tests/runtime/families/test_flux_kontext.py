"""Flux.1 Kontext: the reference has the pipeline's size and the target's time, and samples are drawn with it."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_runtime.families import get_family
from atelier_runtime.parallel import Distributed
from atelier_runtime.prompt_pictures import prompt_pictures
from atelier_runtime.sampling import draw_samples
from control_cases import ControlledCase, controlled_case
from export_runs import run_file
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny
from tiny_data import picture, write_truncated_picture

FAMILY = get_family("flux_kontext")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("flux_kontext")


class Resized(Exception):
    """The pipeline has chosen a size."""


@pytest.mark.parametrize("size", [(1024, 1024), (640, 480), (480, 640), (3000, 1000), (90, 700), (1001, 997)], ids=str)
def test_at_1024_the_reference_has_the_size_that_the_pipeline_chooses(
    case: Case, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resize(_image: Any, height: int, width: int) -> None:
        raise Resized(width, height)

    monkeypatch.setattr(case.pipe.image_processor, "resize", resize)
    with pytest.raises(Resized) as chosen:
        case.pipe(image=picture(*size), prompt="a", max_sequence_length=16)
    assert FAMILY.reference_size(*size, 1024) == chosen.value.args


def test_at_other_resolutions_the_reference_is_scaled_with_the_target() -> None:
    assert FAMILY.reference_size(640, 480, 512) == (592, 448)  # half of 1184 x 880, to multiples of 16
    assert FAMILY.reference_size(10, 10, 16) == (16, 16)


@torch.no_grad()
def test_the_reference_has_the_time_of_the_target(case: Case) -> None:
    """Not time 0: the stock pipeline has one time for all tokens."""
    calls: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    handle.remove()
    [call] = calls
    assert torch.equal(call["timestep"], time)
    target, reference = (each.shape[-1] * each.shape[-2] // 4 for each in (noisy, *conditions.references))
    assert call["hidden_states"].shape[1] == target + reference
    assert call["img_ids"][:, 0].tolist() == [0] * target + [1] * reference


def validated(folder: Path, *references: Path) -> RunFile:
    """A run that draws a picture of 48 x 32 from each of the references."""
    prompts = [{"text": "make it red", "references": [str(each)]} for each in references]
    validation = {"prompts": prompts, "steps": 1, "width": 48, "height": 32}
    return run_file("flux_kontext", folder, {"type": "lora"}, validation=validation)


def test_a_run_draws_its_prompts_from_their_references(case: Case, tmp_path: Path) -> None:
    save_tiny("flux_kontext", tmp_path)
    upright = picture(70, 40, seed=1)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    picture(70, 40, seed=2).save(tmp_path / "other.png")
    file = validated(tmp_path, *(tmp_path / f"{name}.png" for name in ("upright", "turned", "other")))
    assert [len(each.references) for each in prompt_pictures(file, FAMILY)] == [1, 1, 1]
    drawn = draw_samples(file, FAMILY, case.denoisers, Distributed(0, 0, 1, torch.device("cpu")))
    pictures = [Image.open(io.BytesIO(drawn[index])) for index in range(3)]
    assert {each.size for each in pictures} == {(48, 32)}
    assert drawn[0] == drawn[1]
    difference = np.asarray(pictures[0], np.int16) - np.asarray(pictures[2], np.int16)
    assert np.abs(difference).max() > 0


def test_a_reference_of_a_prompt_that_is_not_there_or_no_picture_is_refused(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "whole.png")
    write_truncated_picture(tmp_path / "cut.png")
    field = r"spec\.validation\.prompts\[1\]\.references\[0\] is '.*"
    for name, reason in (("nowhere.png", "is not there"), ("cut.png", r"cannot be read as a picture \(.*\)")):
        with pytest.raises(ConfigError, match=f"{field}{name}', which {reason}; name another"):
            prompt_pictures(validated(tmp_path, tmp_path / "whole.png", tmp_path / name), FAMILY)


@pytest.fixture(scope="module")
def controlled() -> ControlledCase:
    return controlled_case("flux_kontext", trained=True)


@torch.no_grad()
def test_the_network_sees_the_picture_that_is_drawn_and_adds_nothing_to_the_reference(
    controlled: ControlledCase,
) -> None:
    seen: list[int] = []
    added: list[torch.Tensor] = []
    handles = [
        controlled.network.register_forward_pre_hook(
            lambda _module, _args, call: seen.append(call["hidden_states"].shape[1]), with_kwargs=True
        ),
        controlled.base.register_forward_hook(  # which is shown what others have added
            lambda _module, _args, call, _output: added.extend(
                [*call["controlnet_block_samples"], *call["controlnet_single_block_samples"]]
            ),
            with_kwargs=True,
        ),
    ]
    controlled.pipe(**controlled.family.sampling_arguments(controlled.pipe, controlled.request(3.5, steps=1)))
    for handle in handles:
        handle.remove()
    drawn = 64 * 32 // 16**2
    assert seen == [drawn]
    assert len(added) == 4
    assert all(each.shape[1] > drawn and each[:, :drawn].any() and not each[:, drawn:].any() for each in added)


@torch.no_grad()
def test_without_a_network_that_does_something_our_pipeline_is_the_stock_one(case: Case) -> None:
    ours = controlled_case("flux_kontext", trained=False)
    pictures = [
        each.pipe(**each.family.sampling_arguments(each.pipe, each.request(3.5, steps=2)), output_type="pt")[0]
        for each in (case, ours)
    ]
    assert torch.equal(*pictures)


@torch.no_grad()
def test_without_references_the_network_steers_as_in_the_stock_pipeline_of_flux(
    controlled: ControlledCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only pipeline of diffusers that takes this network knows no references."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mean)
    stock = replace(controlled, pipe=FluxControlNetPipeline(**controlled.pipe.components))
    stock.pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPTS[0],
        "control_image": controlled.picture(0),
        **{"width": 64, "height": 32, "guidance_scale": 3.5, "num_inference_steps": 3, "max_sequence_length": 16},
    }
    results = []
    for pipe, more in ((controlled.pipe, {"max_area": 64 * 32}), (stock.pipe, {})):
        generator = torch.Generator().manual_seed(3)
        results.append(pipe(**arguments, **more, generator=generator, output_type="latent")[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
