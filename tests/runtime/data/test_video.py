from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from atelier_runtime.data.buckets import Bucket, place
from atelier_runtime.data.image import UnreadableError
from atelier_runtime.data.video import probe_clip, read_clip
from tiny_data import grey_frames, write_clip

BUCKET = Bucket(32, 32)


def brightness(pixels: torch.Tensor) -> list[float]:
    """Mean of each frame, 0 to 255."""
    return [round(float(value), 1) for value in (pixels.mean(dim=(0, 2, 3)) + 1) * 127.5]


def ramp(count: int) -> list[int]:
    """Brightness that tells the number of a frame: five levels apart, which survives the codec."""
    return [20 + 5 * number for number in range(count)]


def shown(pixels: torch.Tensor) -> list[int]:
    return [round((value - 20) / 5) for value in brightness(pixels)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames at 25 per second: 1.6 seconds."""
    return write_clip(tmp_path_factory.mktemp("clips") / "ramp.mp4", grey_frames(ramp(40)), 25)


@pytest.mark.parametrize(
    ("fps", "frames"),
    [
        pytest.param(25, 40, id="own rate"),
        pytest.param(16, 25, id="slower"),
        pytest.param(12.5, 20, id="every second"),
        pytest.param(30, 48, id="faster repeats frames"),
        pytest.param(23.976, 38, id="a film's rate"),
    ],
)
def test_each_frame_is_the_files_frame_nearest_in_time(clip: Path, fps: float, frames: int) -> None:
    pixels = read_clip(clip, frames, fps, place(64, 48, BUCKET))
    assert pixels.shape == (3, frames, 32, 32)
    # Halves go to the later frame; the last one is held until its own time is over.
    expected = [
        min(39, int(np.floor(k * 25 / Fraction(fps).limit_denominator(10_000) + Fraction(1, 2)))) for k in range(frames)
    ]
    assert shown(pixels) == expected


def test_resampling_is_not_trimming(clip: Path) -> None:
    """At 16 per second, 17 frames last a second: the last one is the file's frame 25, not its frame 16."""
    assert shown(read_clip(clip, 17, 16, place(64, 48, BUCKET)))[-1] == 25


@pytest.mark.parametrize(("fps", "there_are"), [(25, 40), (16, 26), (8, 13), (50, 80)])
def test_short_clips_tell_how_many_frames_they_have_at_the_rate(clip: Path, fps: float, there_are: int) -> None:
    assert probe_clip(clip, 1000, fps).frames == there_are
    assert probe_clip(clip, 9, fps).frames == 9
    with pytest.raises(UnreadableError, match=f"{there_are} frames at {fps} per second instead of 1000"):
        read_clip(clip, 1000, fps, place(64, 48, BUCKET))


def test_uneven_time_stamps_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "uneven.mkv"
    times_ms = [0, 40, 80, 500, 540, 1000]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        stream.codec_context.time_base = Fraction(1, 1000)
        for value, time in zip(ramp(6), times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(grey_frames([value])[0], format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # 0, 125, 250, 375, 500, 625, 750, 875, 1000 ms
    assert shown(read_clip(path, 9, 8, place(64, 48, BUCKET))) == [0, 2, 2, 3, 3, 4, 4, 5, 5]


def test_clips_that_do_not_start_at_zero_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, value in enumerate(ramp(4)):
            frame = av.VideoFrame.from_ndarray(grey_frames([value])[0], format="rgb24")
            frame.pts = 50 + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert shown(read_clip(path, 4, 10, place(64, 48, BUCKET))) == [0, 1, 2, 3]


def test_frames_are_fitted_like_pictures(tmp_path: Path) -> None:
    array = np.zeros((32, 64, 3), np.uint8)
    array[:, 32:] = 255
    path = write_clip(tmp_path / "halves.mp4", [array] * 3, 10)
    pixels = read_clip(path, 3, 10, place(64, 32, BUCKET, (0.0, 0.999)))
    assert pixels[:, :, :, 4:].min() > 0.9  # only the right half is kept
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_pixels_that_are_not_square_are_straightened(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "wide.mkv", grey_frames([100] * 3), 10, sample_aspect_ratio=Fraction(2, 1))
    facts = probe_clip(path, 3, 10)
    assert (facts.width, facts.height) == (128, 48)


def test_a_rotation_written_beside_the_frames_is_applied(tmp_path: Path) -> None:
    array = np.zeros((32, 64, 3), np.uint8)
    array[:, :32, 0] = 255  # red on the left
    path = write_clip(tmp_path / "turned.mp4", [array] * 3, 10)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    fixed = [
        0,
        1 << 16,
        0,
        -(1 << 16) & 0xFFFFFFFF,
        0,
        0,
        32 << 16,
        0,
        1 << 30,
    ]  # a quarter turn clockwise, as phones write it
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big") for value in fixed)
    path.write_bytes(data)
    facts = probe_clip(path, 3, 10)
    assert (facts.width, facts.height) == (32, 64)
    pixels = read_clip(path, 3, 10, place(32, 64, Bucket(32, 64)))
    assert pixels[0, 0, :28].min() > 0.5  # turned clockwise, the left side is on top
    assert pixels[0, 0, 36:].max() < -0.5


@pytest.mark.parametrize("cut", [0.02, 0.5])
def test_truncated_clips_are_rejected_with_a_reason(clip: Path, tmp_path: Path, cut: float) -> None:
    path = tmp_path / "cut.mp4"
    data = clip.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(UnreadableError, match=r"\w+"):
        probe_clip(path, 40, 25)


def test_files_without_pictures_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UnreadableError, match="no video stream"):
        probe_clip(path, 1, 8)
    text = tmp_path / "text.mp4"
    text.write_text("no clip")
    with pytest.raises(UnreadableError):
        probe_clip(text, 1, 8)
