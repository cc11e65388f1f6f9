"""Small training sets and run files for tests of the runtime."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from atelier_api.run_file import RunFile
from numpy.typing import NDArray
from PIL import Image
from run_files import run_file


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


def training_run_file(folder: Path, sources: list[Path], model_folder: Path, family: str = "sd3", **spec: Any) -> RunFile:
    """A run over these sources in fp32, with its cache below `folder`. `spec` has the blocks `data` and `hyperparameters`."""
    data = {"sources": [{"uri": str(source)} for source in sources], "resolution": 32, **spec.get("data", {})}
    hyperparameters = {"steps": 4, "precision": "fp32", **spec.get("hyperparameters", {})}
    model = {"family": family, "source": str(model_folder)}
    resolved = run_file(folder, model=model, data=data, hyperparameters=hyperparameters)
    return resolved.model_copy(update={"model_folder": str(model_folder)})
