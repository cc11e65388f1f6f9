"""A whole run of a slider, by the command that users type: a tiny SDXL, real digits, black on white and white on black."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from runs import LocalRun, tiny_run, write_digits, write_run

pytestmark = pytest.mark.processes

STRENGTHS = ("-2", "0", "1", "2")


def slider(folder: Path, name: str, **spec: Any) -> LocalRun:
    """`light` are digits on white, `dark` their negatives."""
    if not (folder / "light").exists():
        for side in ("light", "dark"):
            write_digits(folder / side, 5)
        for path in sorted((folder / "dark").glob("*.png")):
            ImageOps.invert(Image.open(path)).save(path)
    document = tiny_run(
        folder,
        "sdxl",
        name=name,
        adapter={"type": "lora", "rank": 4, "slider": True},
        data={"sources": [{"uri": "light", "sliderStrength": "1"}, {"uri": "dark", "sliderStrength": "-1"}]},
        **{"hyperparameters": {"steps": 4, "learningRate": "1e-1"}, **spec},
    )
    return write_run(folder / f"{name}.yaml", document.document)


def test_a_slider_trains_and_is_drawn_at_each_strength(tmp_path: Path) -> None:
    prompts = [{"text": "a handwritten three", "adapterStrength": strength} for strength in STRENGTHS]
    run = slider(tmp_path, "slider", validation={"prompts": prompts, "steps": 2})
    run.train()
    start, drawn = (
        [(run.folder / "samples" / step / f"{index}.png").read_bytes() for index in range(len(STRENGTHS))]
        for step in ("00000000", "00000004")
    )
    assert len(set(start)) == 1  # a new adapter changes nothing at any strength
    assert len(set(drawn)) == len(STRENGTHS)
    assert drawn[1] == start[1]  # and at strength 0 it never does
