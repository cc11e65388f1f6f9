"""Sounds: decoded with PyAV, resampled to a rate, as waveforms of two channels.

One training sample is made from each file: its beginning, up to a length. Longer files are not cut into several. A file of one
channel is the same on both; more than two are mixed down by ffmpeg. Loudness stays as it is. What cannot be decoded to the end, or
that far, raises UnreadableError; a file that was cut off between two frames is the shorter file that it looks like.
"""

import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atelier_runtime.data.image import UnreadableError

CHANNELS = 2
_LOUDEST = 2**15 - 1
_AUDIBLE = 1e-3
"""-60 dB of full scale: what never gets as loud is a track that was never recorded, or was exported muted."""


def read_sound(path: Path, rate: int, samples: int) -> Tensor:
    """The first `samples` samples at `rate` per second, [2, samples], in [-1, 1] or a little beyond.

    Raises UnreadableError where there are fewer.
    """
    pieces = list(_resampled(path, rate, samples))
    waveform = np.concatenate(pieces, axis=1) if pieces else np.zeros((CHANNELS, 0), np.float32)
    if waveform.shape[1] < samples:
        raise UnreadableError(f"{waveform.shape[1]} samples at {rate} per second instead of {samples}")
    return torch.from_numpy(waveform)


def probe_sound(path: Path, rate: int, most: int) -> int:
    """How many samples there are at the rate, up to `most`: decodes what training would use.

    Raises UnreadableError where that fails, and for silence.
    """
    samples, loudest = 0, 0.0
    for piece in _resampled(path, rate, most):
        samples += piece.shape[1]
        loudest = max(loudest, float(np.abs(piece).max(initial=0.0)))
    if samples and loudest < _AUDIBLE:
        raise UnreadableError("silence: nothing louder than -60 dB in what is used of it")
    return samples


def write_sound(waveform: Tensor, rate: int) -> bytes:
    """A FLAC file of 16 bits, which browsers play, of a waveform [2, N] in [-1, 1]."""
    levels = (waveform.detach().cpu().float().clamp(-1, 1) * _LOUDEST).round().to(torch.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=rate, layout="stereo", format="s16")
        interleaved = np.ascontiguousarray(levels.numpy().T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout="stereo")
        frame.sample_rate = rate
        for packet in chain(stream.encode(frame), stream.encode()):
            container.mux(packet)
    return buffer.getvalue()


def _resampled(path: Path, rate: int, most: int) -> Iterator[NDArray[np.float32]]:
    """Pieces [2, n] of the file at the rate, `most` samples in all where it has as many."""
    left = most
    for piece in _pieces(path, rate):
        if not np.isfinite(piece).all():
            raise UnreadableError("samples that are not finite")
        yield piece[:, :left]
        left -= min(left, piece.shape[1])
        if left == 0:
            return


def _pieces(path: Path, rate: int) -> Iterator[NDArray[np.float32]]:
    """The whole file at the rate, in pieces [2, n]."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise UnreadableError("no audio stream in it")
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1  # files are decoded side by side
            # ffmpeg makes one channel quieter when it makes two of it, so that is done below.
            layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise UnreadableError("a damaged frame")
                for piece in resampler.resample(frame):
                    yield _on_both_channels(piece)
            for piece in resampler.resample(None):
                yield _on_both_channels(piece)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(str(error) or type(error).__name__) from error


def _on_both_channels(frame: av.AudioFrame) -> NDArray[np.float32]:
    array = frame.to_ndarray()
    return np.repeat(array, CHANNELS, axis=0) if len(array) == 1 else array
