"""Whole runs on pairs: a tiny Kontext checkpoint, real digits, each with its negative as reference.

One is trained by the command that users type, the others by ranks that are forks (see `runs`).
"""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from atelier_api.exit_codes import ExitCode
from runs import LocalRun, history, tiny_run, write_digits, write_run

pytestmark = pytest.mark.processes


def pairs(folder: Path, name: str, originals: str = "originals", **spec: Any) -> LocalRun:
    """Digits as targets; `originals` are their negatives, `blank` white sheets. The last sample lacks its reference."""
    if not (folder / "pictures").exists():
        write_digits(folder / "pictures", 9)
        for place in ("originals", "blank"):
            (folder / place).mkdir()
        for path in sorted((folder / "pictures").glob("*.png"))[:-1]:
            ImageOps.invert(Image.open(path)).save(folder / "originals" / path.with_suffix(".jpg").name)
            Image.new("RGB", (32, 32), "white").save(folder / "blank" / path.name)
    data = {"sources": [{"uri": "pictures", "references": [originals]}]}
    document = tiny_run(folder, "flux_kontext", name=name, data=data, **{"hyperparameters": {"steps": 4}, **spec})
    return write_run(folder / f"{name}.yaml", document.document)


def test_a_run_on_pairs_trains_resumes_draws_and_publishes(tmp_path: Path) -> None:
    prompts = [
        {"text": "a handwritten three", "references": [f"{place}/0000.{kind}"]}
        for place, kind in (("originals", "jpg"), ("blank", "png"))
    ]
    broken = pairs(tmp_path, "broken", hyperparameters={"steps": 2}, validation={"prompts": prompts, "steps": 2})
    broken.train_in_forks()
    broken.changed(hyperparameters={"steps": 4}).train_in_forks()
    straight = pairs(tmp_path, "straight")
    straight.train_in_forks()
    assert history(broken) == history(straight)
    drawn = [(broken.folder / "samples" / "00000004" / f"{index}.png").read_bytes() for index in (0, 1)]
    assert drawn[0] != drawn[1]
    assert (broken.folder / "exports/diffusers/pytorch_lora_weights.safetensors").exists()
    assert (broken.folder / "exports/kohya/broken.safetensors").exists()

    once = {"hyperparameters": {"steps": 1}, "parallelism": {"processesPerNode": 1}}
    blank = pairs(tmp_path, "blank", originals="blank", **once)
    told = blank.train()
    assert "no reference 1, kept 8" in told
    assert "no picture 0008.*" in told
    # The references reach the network in training.
    assert history(blank)[0] != pytest.approx(history(straight)[0], rel=1e-4)


def test_a_prompt_whose_reference_is_no_picture_stops_the_run_before_anything_is_encoded(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    prompts = [{"text": "a handwritten three", "references": ["text.png"]}]
    bad = pairs(tmp_path, "bad", parallelism={"processesPerNode": 1}, validation={"prompts": prompts, "steps": 2})
    failure = bad.failure_in_forks()
    assert failure.exit_code is ExitCode.CONFIG
    assert "spec.validation.prompts[0].references[0] is" in failure.message
    assert "no picture of a known format" in failure.message
    assert not list(Path(bad.resolved().cache_uri).rglob("*.index"))
