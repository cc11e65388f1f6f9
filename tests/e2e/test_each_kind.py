"""A whole run of one family of each kind, by the command that users type, from a tiny checkpoint in a folder laid out as the hub's.

Pictures by flow with three encoders are in test_local_run.py, pairs in test_pairs.py. A second family of a kind is trained by a rank
that is a fork (see `runs`).
"""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atelier_runtime.families import FAMILIES
from family_models import FAMILY_OF, TINY, save_tiny
from finished_runs import assert_finished, assert_lora_trained
from runs import LocalRun, tiny_run
from tiny_data import slow_down, tone, write_clip, write_tone

pytestmark = pytest.mark.processes


SLOW = 4000
"""Samples a second of sounds: the tiny autoencoder has less to do than at 48,000."""


@dataclass(frozen=True)
class Kind:
    """A tiny checkpoint, how it is trained, and what its run publishes beside the samples. `typed`: by the command."""

    checkpoint: str
    exports: tuple[str, ...] = ("diffusers/pytorch_lora_weights.safetensors", "kohya/kind.safetensors")
    prompt: dict[str, Any] = field(default_factory=dict)
    shown: int = 1
    precision: str = "fp32"
    steps: int = 2
    typed: bool = True


DIFFUSERS_ALONE = ("diffusers/pytorch_lora_weights.safetensors",)
TWO_EXPERTS = tuple(
    f"{layout}/{name}.safetensors"
    for layout, name in (
        ("diffusers", "pytorch_lora_weights"),
        ("diffusers", "pytorch_lora_weights_low_noise"),
        ("kohya", "kind_high_noise"),
        ("kohya", "kind_low_noise"),
    )
)
KINDS = {
    "pictures by flow, packed tokens": Kind("flux", precision="bf16", typed=False),
    "pictures by diffusion, a UNet": Kind("sdxl", precision="bf16"),
    "pictures by a mixture of experts": Kind("hidream"),
    "clips of text": Kind("wan", precision="bf16"),
    "clips of a picture": Kind("wan_i2v", prompt={"image": "first.png"}, precision="bf16"),
    "clips of two experts": Kind("wan22", TWO_EXPERTS, steps=8),
    "clips that go on": Kind(
        "longcat_video_continued", DIFFUSERS_ALONE, prompt={"image": "clips/0.mp4"}, shown=5, typed=False
    ),
    "pictures by diffusion on a cosine, decoded by another model": Kind("stable_cascade", DIFFUSERS_ALONE, typed=False),
    "songs": Kind("ace_step", DIFFUSERS_ALONE, prompt={"lyrics": "one two three"}, precision="bf16"),
}


def write_clips(folder: Path, count: int) -> None:
    """Squares that move over a gradient, with sidecar captions."""
    folder.mkdir()
    ramp = np.tile(np.linspace(40, 200, 32, dtype=np.uint8)[:, None, None], (1, 32, 3))
    for index in range(count):
        frames = [ramp.copy() for _ in range(9)]
        for shift, frame in enumerate(frames):
            frame[4 + index : 12 + index, 2 * shift : 2 * shift + 8] = (250, 20 * index, 30)
        write_clip(folder / f"{index}.mp4", frames, Fraction(16))
        (folder / f"{index}.txt").write_text(f"a red square number {index} moves to the right\n")


def write_songs(folder: Path, count: int, rate: int) -> None:
    """Chords of two seconds and more, each with a caption and every other one with lyrics."""
    folder.mkdir()
    for index in range(count):
        write_tone(folder / f"{index}.wav", tone(2 + index / 2, rate, 220, 220 + 55 * index), rate)
        (folder / f"{index}.txt").write_text(f"a slow chord, number {index}\n")
        if index % 2:
            (folder / f"{index}.lyrics.txt").write_text("[verse]\none two three\n")


def data_of(kind: Kind, folder: Path) -> dict[str, Any]:
    """Writes what the kind trains on, but pictures, which every run has."""
    modality, tiny = FAMILIES[FAMILY_OF[kind.checkpoint]].facts.modality, TINY[kind.checkpoint]
    if modality == "image":
        return {"resolution": tiny.width, "maxUpscale": "8"}
    if modality == "video":
        write_clips(folder / "clips", 4)
        Image.new("RGB", (32, 32), "navy").save(folder / "first.png")
        clip = {"frames": tiny.frames, "shownFrames": kind.shown}
        return {"resolution": tiny.width, "sources": [{"uri": "clips"}], "clip": clip}
    slow_down(folder / "base", SLOW)
    write_songs(folder / "songs", 4, SLOW)
    audio = {"maxSeconds": 3, "minSeconds": 1, "bucketSeconds": 1}
    return {"sources": [{"uri": "songs"}], "audio": audio}


def run_of(kind: Kind, folder: Path) -> LocalRun:
    facts = FAMILIES[FAMILY_OF[kind.checkpoint]].facts
    save_tiny(kind.checkpoint, folder / "base")
    data = data_of(kind, folder)
    length = {"seconds": 2} if facts.modality == "audio" else {}
    return tiny_run(
        folder,
        facts.name,
        name="kind",
        data=data,
        hyperparameters={
            "steps": kind.steps,
            "globalBatchSize": 2,
            "microBatchSize": 1,
            "precision": kind.precision,
            "ema": {"decay": "0.9"},
        },
        parallelism={"processesPerNode": 1},
        validation={"prompts": [{"text": "a red square", **kind.prompt}], "steps": 2, **length},
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_run_trains_draws_and_publishes(kind: Kind, tmp_path: Path) -> None:
    run = run_of(kind, tmp_path)
    if kind.typed:
        run.train()
    else:
        run.train_in_forks()
    assert_finished(run.folder, kind.steps)
    exports = run.folder / "exports"
    files = list(exports.rglob("*.safetensors"))
    assert {path.relative_to(exports).as_posix() for path in files} == set(kind.exports)
    for file in files:  # of two experts, too, each one has been trained
        assert_lora_trained(file)
    modality = FAMILIES[FAMILY_OF[kind.checkpoint]].facts.modality
    ending = {"image": "png", "video": "webp", "audio": "flac"}[modality]
    [sample] = (run.folder / "samples" / f"{kind.steps:08d}").iterdir()
    assert sample.name == f"0.{ending}"
    assert sample.stat().st_size > 0
    assert ((run.folder / "report.html").read_text().count("<audio controls") == 2) is (modality == "audio")
