"""Words learnt in whole runs: a resume is a straight run, and the stock pipeline loads the files. Ranks are forks (see `runs`)."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atelier_api.model_files import inversion_loading
from atelier_runtime.families import FAMILIES
from family_models import save_tiny
from runs import LocalRun, checkpoint_state, history, tiny_run

pytestmark = pytest.mark.processes

STEPS, PROMPT = 4, "<pen> in <red-ink>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inversion")
    save_tiny("sdxl", folder / "base")
    return folder


def run_of(folder: Path, name: str, steps: int = STEPS) -> LocalRun:
    (folder / name).mkdir(exist_ok=True)
    if not (folder / name / "base").exists():
        (folder / name / "base").symlink_to(folder / "base")
    tokens = [
        {"token": "<pen>", "initializer": "p", "vectors": 2},
        {"token": "<red-ink>", "initializer": "ink", "vectors": 3},
    ]
    return tiny_run(
        folder / name,
        "sdxl",
        name=name,
        adapter={"type": "textual-inversion", "tokens": tokens},
        data={"captions": {"trigger": "<pen> <red-ink>"}},
        hyperparameters={"steps": steps, "globalBatchSize": 4, "learningRate": "1e-2", "ema": {"decay": "0.9"}},
        parallelism={"processesPerNode": 1},
        validation={"prompts": [{"text": PROMPT, "seed": 5}], "steps": 2, "everySteps": 100},
    )


@pytest.fixture(scope="module")
def straight(folder: Path) -> LocalRun:
    run = run_of(folder, "straight")
    run.train_in_forks()
    return run


def test_a_resume_trains_what_a_straight_run_does(folder: Path, straight: LocalRun) -> None:
    run_of(folder, "resumed", steps=2).train_in_forks()
    resumed = run_of(folder, "resumed")
    resumed.train_in_forks()
    expected, found = checkpoint_state(straight, STEPS), checkpoint_state(resumed, STEPS)
    assert {key for key in expected if key.startswith("/weights/")} == {
        "/weights/unet.textual_inversion.clip_l",
        "/weights/unet.textual_inversion.clip_g",
    }
    assert expected.keys() == found.keys()
    assert [key for key, tensor in expected.items() if not tensor.equal(found[key])] == []
    assert history(resumed) == history(straight)


def test_the_stock_pipeline_draws_the_last_sample_from_the_published_files(folder: Path, straight: LocalRun) -> None:
    exports = straight.folder / "exports" / "diffusers"
    assert sorted(path.name for path in exports.iterdir()) == ["pen.safetensors", "red-ink.safetensors"]
    averages = checkpoint_state(straight, STEPS)["/ema/averages/unet.textual_inversion.clip_l"]
    assert torch.equal(load_file(exports / "red-ink.safetensors")["clip_l"], averages[2:])
    assert "pipe.load_textual_inversion" in (straight.folder / "report.html").read_text()
    pipe: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "base")
    pipe.set_progress_bar_config(disable=True)
    for token in ("<pen>", "<red-ink>"):
        path = exports / f"{token.strip('<>')}.safetensors"
        exec("\n".join(inversion_loading(FAMILIES["sdxl"].facts, token, str(path))), {"pipe": pipe})
    drawn = pipe(PROMPT, width=32, height=32, num_inference_steps=2, generator=torch.Generator().manual_seed(5))
    samples = straight.folder / "samples"
    first, last = (np.asarray(Image.open(samples / f"{step:08d}" / "0.png"), np.int16) for step in (0, STEPS))
    assert np.abs(np.asarray(drawn.images[0], np.int16) - last).max() <= 1
    assert np.abs(first - last).max() > 1
