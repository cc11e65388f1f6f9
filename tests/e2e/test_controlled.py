"""Whole runs of a control network: a tiny SDXL, quantised, on digits with their negatives. Ranks are forks (see `runs`)."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import ControlNetModel
from PIL import Image, ImageOps

from atelier_api.exit_codes import ExitCode
from runs import LocalRun, checkpoint_state, history, tiny_run, write_digits, write_run

pytestmark = pytest.mark.processes


def controlled(folder: Path, name: str, **spec: Any) -> LocalRun:
    """Digits as pictures; `edges` are their negatives, but for the last. `blank.png` is a white sheet."""
    if not (folder / "pictures").exists():
        write_digits(folder / "pictures", 9)
        (folder / "edges").mkdir()
        Image.new("RGB", (32, 32), "white").save(folder / "blank.png")
        for path in sorted((folder / "pictures").glob("*.png"))[:-1]:
            ImageOps.invert(Image.open(path)).save(folder / "edges" / path.with_suffix(".jpg").name)
    data = {"sources": [{"uri": "pictures", "conditioning": "edges"}]}
    changes = {
        "model": {"quantization": "int8"},
        "hyperparameters": {"steps": 4, "learningRate": "1e-2"},
        "parallelism": {"processesPerNode": 1},
        **spec,
    }
    document = tiny_run(folder, "sdxl", name=name, adapter={"type": "controlnet"}, data=data, **changes)
    return write_run(folder / f"{name}.yaml", document.document)


def test_a_control_network_trains_resumes_draws_and_is_published(tmp_path: Path) -> None:
    prompts = [
        {"text": "a handwritten three", "conditioning": picture, "conditioningScale": scale}
        for picture, scale in (("edges/0000.jpg", "1"), ("blank.png", "1"), ("edges/0000.jpg", "0"))
    ]
    shorter = {"steps": 2, "learningRate": "1e-2"}
    broken = controlled(tmp_path, "broken", hyperparameters=shorter, validation={"prompts": prompts, "steps": 2})
    broken.train_in_forks()
    told = broken.told_of_data()
    assert "no conditioning 1, kept 8" in told
    assert "no picture 0008.*" in told
    broken.changed(hyperparameters={"steps": 4}).train_in_forks()
    straight = controlled(tmp_path, "straight")
    straight.train_in_forks()
    assert history(broken) == history(straight)
    one, other = checkpoint_state(broken, 4), checkpoint_state(straight, 4)
    assert one.keys() == other.keys()
    assert all(name.startswith(("/weights/controlnet.", "/optimizer/controlnet.", "/step")) for name in one)
    assert all((one[name] == other[name]).all() for name in one)

    drawn = [(broken.folder / "samples" / "00000004" / f"{index}.png").read_bytes() for index in range(3)]
    assert len(set(drawn)) == 3
    start = [(broken.folder / "samples" / "00000000" / f"{index}.png").read_bytes() for index in range(3)]
    assert len(set(start)) == 1  # at its start the network changes nothing
    assert drawn[2] == start[2]  # and with scale 0 it never does
    folder = broken.folder / "exports/diffusers/controlnet"
    network = ControlNetModel.from_pretrained(folder)
    weights = {name.removeprefix("/weights/controlnet."): each for name, each in one.items() if "/weights/" in name}
    assert weights.keys() == network.state_dict().keys()
    assert all((network.state_dict()[name] == each).all() for name, each in weights.items())


def test_a_prompt_whose_condition_is_no_picture_stops_the_run_before_anything_is_encoded(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    prompts = [{"text": "a handwritten three", "conditioning": "text.png", "conditioningScale": "1"}]
    bad = controlled(tmp_path, "bad", validation={"prompts": prompts, "steps": 2})
    failure = bad.failure_in_forks()
    assert failure.exit_code is ExitCode.CONFIG
    assert "spec.validation.prompts[0].conditioning is" in failure.message
    assert "no picture of a known format" in failure.message
    assert not list(Path(bad.resolved().cache_uri).rglob("*.index"))
