"""Clips: decoded with PyAV, resampled to a frame rate by time, fitted to a bucket, as pixels in [-1, 1].

One training clip is made from each file: its first `frames` frames at the wanted rate. Longer files are not cut into
several clips. Frame k shows the file's frame whose time is nearest to k / fps after the first one, so a faster file loses
frames, a slower one repeats some, and files of uneven rate are followed by their time stamps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atelier_runtime.data.buckets import Placement
from atelier_runtime.data.image import UnreadableError, fit


@dataclass(frozen=True)
class ClipFacts:
    """Upright size in square pixels, and the frames there are at the wanted rate, at most those asked for."""

    width: int
    height: int
    frames: int


def read_clip(path: Path, frames: int, fps: float, placement: Placement) -> Tensor:
    """Pixels [3, F, H, W] in [-1, 1]. Raises UnreadableError where the file is damaged or has fewer frames."""
    return torch.stack([fit(picture, placement) for picture in read_frames(path, frames, fps)], dim=1)


def read_frames(path: Path, frames: int, fps: float) -> Iterator[Image.Image]:
    """Upright RGB pictures of the first frames. Raises UnreadableError where the file is damaged, and after the last of too few."""
    count = 0
    for frame in _resampled(path, frames, fps):
        yield _upright(frame)
        count += 1
    if count < frames:
        raise UnreadableError(f"{count} frames at {fps:g} per second instead of {frames}")


def probe_clip(path: Path, frames: int, fps: float) -> ClipFacts:
    """Decodes what training would use. Raises UnreadableError where that fails."""
    count, width, height = 0, 0, 0
    for frame in _resampled(path, frames, fps):
        if count == 0:
            _upright(frame)  # its pixel format can be converted
        count += 1
        width, height = _square_pixel_size(frame)
    return ClipFacts(width, height, count)


@dataclass(frozen=True)
class _Decoded:
    """A decoded frame with its time in seconds since the file's first frame, and the pixel aspect of its stream."""

    picture: Any
    time: Fraction
    pixel_aspect: Fraction


def _resampled(path: Path, frames: int, fps: float) -> Iterator[_Decoded]:
    """At most `frames` frames at multiples of 1 / fps, each the one nearest in time (halves go to the later one)."""
    period = 1 / Fraction(fps).limit_denominator(10_000)
    wanted = 0
    previous: _Decoded | None = None
    shown_for = Fraction(0)
    for current in _decoded(path):
        if previous is not None:
            shown_for = current.time - previous.time
            while wanted < frames and wanted * period < previous.time + shown_for / 2:
                yield previous
                wanted += 1
        if wanted == frames:
            return
        previous = current
    if previous is None:
        raise UnreadableError("no frame in it")
    # The last frame stays on screen as long as the one before it.
    while wanted < frames and wanted * period < max(previous.time + shown_for, period):
        yield previous
        wanted += 1


def _decoded(path: Path) -> Iterator[_Decoded]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableError("no video stream in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = (
                1  # files are decoded side by side, so threads inside a file only add memory
            )
            aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
            first: Fraction | None = None
            for picture in container.decode(stream):
                if picture.pts is None:
                    raise UnreadableError("a frame without time stamp")
                if picture.is_corrupt:
                    raise UnreadableError("a damaged frame")
                time = Fraction(picture.pts * (picture.time_base or stream.time_base))
                first = time if first is None else first
                yield _Decoded(picture, time - first, aspect)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(str(error) or type(error).__name__) from error


def _upright(frame: _Decoded) -> Image.Image:
    """The frame as RGB, turned by the rotation that phones write beside it. Pixels may be non-square still: `fit` resizes."""
    try:
        array = frame.picture.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, ValueError) as error:
        raise UnreadableError(f"its pixel format {frame.picture.format.name} cannot be converted ({error})") from error
    turns = _quarter_turns(frame)
    return Image.fromarray(np.ascontiguousarray(np.rot90(array, turns)) if turns else array)


def _quarter_turns(frame: _Decoded) -> int:
    """Counter-clockwise quarter turns that bring the frame upright."""
    return round(frame.picture.rotation / 90) % 4


def _square_pixel_size(frame: _Decoded) -> tuple[int, int]:
    width, height = max(1, round(frame.picture.width * frame.pixel_aspect)), frame.picture.height
    return (height, width) if _quarter_turns(frame) % 2 else (width, height)
