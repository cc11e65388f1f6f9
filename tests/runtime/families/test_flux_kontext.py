"""Flux.1 Kontext: the reference has the pipeline's size and the target's time, and samples are drawn with it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from atelier_api.errors import ConfigError
from atelier_api.run_file import RunFile
from atelier_runtime.families import get_family
from atelier_runtime.parallel import Distributed
from atelier_runtime.prompt_pictures import prompt_pictures
from atelier_runtime.sampling import draw_samples
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
