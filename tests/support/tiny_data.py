"""Small training sets and run files for tests of the runtime."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from atelier_api.families import FAMILIES
from atelier_api.run_file import RunFile
from atelier_runtime.data import Dataset, MicroBatch, build_dataset
from atelier_runtime.families.sd3 import StableDiffusion3
from atelier_runtime.family import Features, Latents
from run_files import run_file

SAMPLE_SIZES = [(40, 40), (64, 40), (40, 64), (41, 40)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, sizes: list[tuple[int, int]], caption: str = "a picture") -> None:
    """Captioned PNGs 000.png, 001.png … of these sizes (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        picture(width, height, number).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"{caption} {number}\n")


def write_truncated_picture(path: Path) -> None:
    """A PNG cut in half: its header is whole, its pixels are not."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_clip(path: Path, frames: list[NDArray[np.uint8]], fps: Fraction | int, **stream_settings: Any) -> Path:
    """A clip of these frames [H, W, 3] in MPEG-4 part 2, which every build of the decoder has."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for name, value in stream_settings.items():
            setattr(stream, name, value)
        for array in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def grey_frames(values: list[int], width: int = 64, height: int = 48) -> list[NDArray[np.uint8]]:
    """Uniform frames of these brightnesses."""
    return [np.full((height, width, 3), value, np.uint8) for value in values]


CODECS = {
    "wav": ("pcm_s16le", "s16"),
    "flac": ("flac", "s16"),
    "mp3": ("libmp3lame", "fltp"),
    "ogg": ("libopus", "fltp"),
    "mka": ("pcm_f32le", "flt"),
}
"""Codec and format of samples by the ending of a file."""


def tone(seconds: float, rate: int, *frequencies: float) -> NDArray[np.float32]:
    """A waveform [channels, N], a tone of half the loudness on each channel."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * frequency * time) for frequency in frequencies]).astype(np.float32)


def write_tone(path: Path, waveform: NDArray[np.float32], rate: int) -> Path:
    """A sound file of a waveform [channels, N] of one, two or six channels."""
    codec, form = CODECS[path.suffix[1:]]
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(waveform)]
    array = waveform if form == "fltp" else np.ascontiguousarray(waveform.T).reshape(1, -1)
    if form == "s16":
        array = np.round(array * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(array, format=form, layout=layout)
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    return path


def slow_down(checkpoint: Path, rate: int) -> Path:
    """Has a checkpoint's autoencoder take sounds at another rate: a tiny one has less to do at a low one."""
    path = checkpoint / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": rate}))
    return checkpoint


def training_run_file(
    folder: Path, sources: list[Path], model_folder: Path, family: str = "sd3", **spec: Any
) -> RunFile:
    """A run over these sources in fp32, with its cache below `folder`. `spec` has the blocks `data`, `hyperparameters` and others."""
    size = {} if FAMILIES[family].modality == "audio" else {"resolution": 32}
    data = {"sources": [{"uri": str(source)} for source in sources], **size, **spec.get("data", {})}
    hyperparameters = {"steps": 4, "precision": "fp32", **spec.get("hyperparameters", {})}
    model = {"family": family, "source": str(model_folder)}
    others = {name: block for name, block in spec.items() if name not in ("data", "hyperparameters")}
    resolved = run_file(folder, model=model, data=data, hyperparameters=hyperparameters, **others)
    return resolved.model_copy(update={"model_folder": str(model_folder)})


@dataclass(frozen=True)
class OneRank:
    """A run of one process, without a process group."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class CountingFamily(StableDiffusion3):
    """The real family; counts what it encodes."""

    def __init__(self) -> None:
        self.captions: list[str] = []
        self.pictures = 0

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        self.captions += prompts
        return super().encode_text(pipe, prompts)

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        self.pictures += len(pixels)
        return super().encode_pixels(pipe, pixels)


def no_report(stage: str, detail: str, done: int, total: int) -> None:
    """A report that nobody reads."""


def built(run: RunFile) -> tuple[Dataset, CountingFamily]:
    """The data set of a run, and the family that counted what was encoded for it."""
    family = CountingFamily()
    return build_dataset(run, family, OneRank(), no_report), family


def all_samples(dataset: Dataset, epoch: int = 0) -> dict[str, MicroBatch]:
    """Each sample of an epoch as a micro-batch of its own, by file name."""
    samples = {}
    steps = dataset.order.steps_per_epoch
    for step in range(epoch * steps, (epoch + 1) * steps):
        batch = dataset.order.batch(step)
        for slot in batch.slots:
            loaded = dataset.load([slot], step=step, epoch=batch.epoch)
            samples[loaded.names[0]] = loaded
    return samples
