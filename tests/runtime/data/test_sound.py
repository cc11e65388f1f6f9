"""Sounds as they come: kinds of file, rates and channels; and what is refused."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from atelier_runtime.data.image import UnreadableError
from atelier_runtime.data.sound import probe_sound, read_sound, write_sound
from tiny_data import grey_frames, tone, write_clip, write_tone

RATE = 24_000


def pitch(channel: Tensor) -> float:
    """The loudest frequency in Hz."""
    spectrum = torch.fft.rfft(channel * torch.hann_window(len(channel))).abs()
    return float(spectrum.argmax()) * RATE / len(channel)


@pytest.mark.parametrize(
    ("ending", "rate"),
    [("wav", 44_100), ("wav", 8_000), ("flac", 96_000), ("mp3", 44_100), ("ogg", 48_000), ("mka", RATE)],
)
def test_every_kind_of_file_gives_its_two_channels_at_the_rate(ending: str, rate: int, tmp_path: Path) -> None:
    path = write_tone(tmp_path / f"a.{ending}", tone(1.0, rate, 440, 1320), rate)
    samples = probe_sound(path, RATE, 10 * RATE)
    assert samples == pytest.approx(RATE, abs=0.03 * RATE)  # coders that lose something fill up their last block
    waveform = read_sound(path, RATE, samples)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (2, samples)
    assert [pitch(channel) for channel in waveform] == pytest.approx([440, 1320], abs=3)
    assert waveform.abs().amax(dim=1).tolist() == pytest.approx([0.5, 0.5], abs=0.06)


def test_one_channel_is_the_same_on_both_and_as_loud(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.wav", tone(0.5, RATE, 440), RATE)
    waveform = read_sound(path, RATE, RATE // 2)
    assert torch.equal(waveform[0], waveform[1])
    torch.testing.assert_close(waveform[0], torch.from_numpy(tone(0.5, RATE, 440)[0]), atol=1e-4, rtol=0)


def test_six_channels_are_mixed_down(tmp_path: Path) -> None:
    waveform = tone(0.5, RATE, 440, 1320, 100, 100, 100, 100)
    waveform[2:] /= 5  # centre, bass and the sides are on both
    mixed = read_sound(write_tone(tmp_path / "a.wav", waveform, RATE), RATE, RATE // 2)
    assert mixed.shape == (2, RATE // 2)
    assert [pitch(channel) for channel in mixed] == pytest.approx([440, 1320], abs=3)


def test_a_sound_is_read_from_its_beginning_as_far_as_asked(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.flac", tone(1.0, RATE, 440, 660), RATE)
    whole = read_sound(path, RATE, RATE)
    assert torch.equal(read_sound(path, RATE, 5000), whole[:, :5000])
    assert probe_sound(path, RATE, 5000) == 5000
    with pytest.raises(UnreadableError, match="24000 samples at 24000 per second instead of 24001"):
        read_sound(path, RATE, RATE + 1)


def test_what_is_no_sound_is_refused_with_a_reason(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "a.mkv", grey_frames([100] * 3), 10)
    with pytest.raises(UnreadableError, match="no audio stream in it"):
        probe_sound(silent, RATE, RATE)
    text = tmp_path / "b.wav"
    text.write_text("no sound")
    with pytest.raises(UnreadableError, match=r"\w+"):
        probe_sound(text, RATE, RATE)
    waveform = tone(0.5, RATE, 440, 660)
    waveform[1, 300] = np.nan
    with pytest.raises(UnreadableError, match="not finite"):
        probe_sound(write_tone(tmp_path / "c.mka", waveform, RATE), RATE, RATE)


def test_a_silent_track_is_refused_and_a_quiet_one_is_not(tmp_path: Path) -> None:
    """Of the part that is used, whatever comes after it."""
    late = np.concatenate([np.zeros((2, RATE), np.float32), tone(0.5, RATE, 440, 660)], axis=1)
    path = write_tone(tmp_path / "a.wav", late, RATE)
    with pytest.raises(UnreadableError, match=r"silence: nothing louder than -60 dB in what is used of it"):
        probe_sound(path, RATE, RATE)
    assert probe_sound(path, RATE, 2 * RATE) == late.shape[1]
    assert probe_sound(write_tone(tmp_path / "b.wav", tone(0.5, RATE, 440, 660) / 100, RATE), RATE, RATE) == RATE // 2


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.flac", tone(1.0, RATE, 440, 660), RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableError, match=r"\w+"):
        probe_sound(path, RATE, RATE)


def test_what_is_written_is_a_flac_file_with_the_waveform(tmp_path: Path) -> None:
    waveform = torch.from_numpy(tone(0.5, RATE, 440, 660)) * 2.5  # beyond what a file holds
    data = write_sound(waveform, RATE)
    with av.open(io.BytesIO(data)) as container:
        assert container.format.name == "flac"
        assert container.streams.audio[0].rate == RATE
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    torch.testing.assert_close(read_sound(path, RATE, waveform.shape[1]), waveform.clamp(-1, 1), atol=1e-4, rtol=0)
