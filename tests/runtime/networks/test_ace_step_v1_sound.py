"""What ACE-Step v1 hears and makes music with, against its equations written again in numpy, with loops over bands and samples."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from atelier_runtime.networks import ADaMoSHiFiGANV1, MusicDCAE
from family_cases import chord
from family_models.ace_step_v1 import DCAE, PUBLISHED_DCAE, VOCODER, music_dcae

Array = np.ndarray
Weights = Mapping[str, Array]
RATE, WINDOW, HOP, BANDS = 44_100, 2048, 512, 128


def hertz(mel: float) -> float:
    """Slaney's scale: 200 hertz for 3 up to 1000 hertz, then 27 steps for a factor of 6.4."""
    return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def mel_of(frequency: float) -> float:
    return 3 * frequency / 200 if frequency < 1000 else 15 + 27 * math.log(frequency / 1000) / math.log(6.4)


def log_mel(samples: Array) -> Array:
    """[bands, frames] of [N], frame by frame."""
    around = (WINDOW - HOP) // 2
    padded = np.concatenate([samples[around:0:-1], samples, samples[-2 : -2 - around : -1]])
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / WINDOW) for n in range(WINDOW)])
    low, high = mel_of(40.0), mel_of(16_000.0)
    corners = [hertz(low + (high - low) * step / (BANDS + 1)) for step in range(BANDS + 2)]
    frequencies = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    frames = []
    for start in range(0, len(samples), HOP):
        spectrum = np.fft.rfft(padded[start : start + WINDOW] * window)
        loudness = np.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-6)
        bands = []
        for left, middle, right in zip(corners, corners[1:], corners[2:], strict=False):
            rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
            weights = np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)
            bands.append(math.log(max(1e-5, float(weights @ loudness))))
        frames.append(bands)
    return np.array(frames).T


def convolved(kernel: Array, bias: Array, samples: Array, apart: int = 1, *, edges: bool = False) -> Array:
    """[C, N] under a kernel at every place, zeros around them, or with `edges` the first and last sample again."""
    size = kernel.shape[-1]
    around = apart * (size - 1) // 2
    padded = np.pad(samples, ((0, 0), (around, around)), mode="edge" if edges else "constant")
    result = np.zeros((len(kernel), samples.shape[1]))
    for place in range(samples.shape[1]):
        seen = padded[:, place : place + apart * (size - 1) + 1 : apart]
        if kernel.shape[1] == 1 and len(samples) > 1:
            result[:, place] = (kernel[:, 0] * seen).sum(axis=1)
        else:
            result[:, place] = np.tensordot(kernel, seen, axes=2)
    return result + bias[:, None]


def layer(weights: Weights, name: str, samples: Array, apart: int = 1, *, edges: bool = False) -> Array:
    return convolved(weights[f"{name}.weight"], weights[f"{name}.bias"], samples, apart, edges=edges)


def kernel_of(weights: Weights, name: str) -> Array:
    direction, length = weights[f"{name}.weight_v"], weights[f"{name}.weight_g"]
    return np.stack([g * v / math.sqrt((v**2).sum()) for g, v in zip(length[:, 0, 0], direction, strict=True)])


def normed_layer(weights: Weights, name: str, samples: Array, apart: int = 1) -> Array:
    return convolved(kernel_of(weights, name), weights[f"{name}.bias"], samples, apart)


def lengthened(weights: Weights, name: str, samples: Array, rate: int) -> Array:
    """Each sample puts a copy of the kernel at `rate` times its place; what sticks out at the ends is cut."""
    kernel = kernel_of(weights, name)
    size = kernel.shape[-1]
    whole = np.zeros((kernel.shape[1], (samples.shape[1] - 1) * rate + size))
    for place in range(samples.shape[1]):
        whole[:, place * rate : place * rate + size] += np.tensordot(samples[:, place], kernel, axes=1)
    cut = (size - rate) // 2
    return whole[:, cut : cut + samples.shape[1] * rate] + weights[f"{name}.bias"][:, None]


def silu(values: Array) -> Array:
    return values / (1 + np.exp(-values))


def standardised(weights: Weights, name: str, frames: Array) -> Array:
    centred = frames - frames.mean(axis=0)
    normed = centred / np.sqrt((centred**2).mean(axis=0) + 1e-6)
    return normed * weights[f"{name}.weight"][:, None] + weights[f"{name}.bias"][:, None]


def convnext(weights: Weights, name: str, frames: Array) -> Array:
    inner = standardised(weights, f"{name}.norm", layer(weights, f"{name}.dwconv", frames))
    inner = weights[f"{name}.pwconv1.weight"] @ inner + weights[f"{name}.pwconv1.bias"][:, None]
    inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
    inner = weights[f"{name}.pwconv2.weight"] @ inner + weights[f"{name}.pwconv2.bias"][:, None]
    return frames + weights[f"{name}.gamma"][:, None] * inner


def played(weights: Weights, mel: Array) -> Array:
    """The waveform [N] of a spectrogram [bands, frames] by the tiny vocoder."""
    frames = layer(weights, "backbone.channel_layers.0.0", mel, edges=True)
    frames = standardised(weights, "backbone.channel_layers.0.1", frames)
    frames = convnext(weights, "backbone.stages.0.0", frames)
    frames = layer(weights, "backbone.channel_layers.1.1", standardised(weights, "backbone.channel_layers.1.0", frames))
    frames = standardised(weights, "backbone.norm", convnext(weights, "backbone.stages.1.0", frames))
    samples = normed_layer(weights, "head.conv_pre", frames)
    for step, rate in enumerate(VOCODER["upsample_rates"]):
        samples = lengthened(weights, f"head.ups.{step}", silu(samples), rate)
        results = []
        for number in (2 * step, 2 * step + 1):
            result = samples
            for pair, apart in enumerate((1, 3, 5)):
                inner = normed_layer(weights, f"head.resblocks.{number}.convs1.{pair}", silu(result), apart)
                result = result + normed_layer(weights, f"head.resblocks.{number}.convs2.{pair}", silu(inner))
            results.append(result)
        samples = sum(results) / len(results)
    return np.tanh(normed_layer(weights, "head.conv_post", silu(samples)))[0]


def in_float64(module: torch.nn.Module) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


def disturbed(vocoder: ADaMoSHiFiGANV1) -> ADaMoSHiFiGANV1:
    """Biases and scales random, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in vocoder.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("weight_g"):
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    return vocoder


def test_spectrograms_are_those_of_the_textbook() -> None:
    waveform = chord(0, 4 * HOP / RATE + 2 * HOP / RATE, RATE)
    actual = ADaMoSHiFiGANV1(**VOCODER).log_mel(waveform)
    assert actual.shape == (2, BANDS, 6)
    for side in range(2):
        expected = log_mel(waveform[side].double().numpy())
        np.testing.assert_allclose(actual[side].numpy(), expected, atol=2e-3)
        assert expected.std() > 1
    silence = ADaMoSHiFiGANV1(**VOCODER).log_mel(torch.zeros(2, 2048))
    assert silence.isfinite().all()


@torch.no_grad()
def test_the_vocoder_equals_its_equations_written_with_loops() -> None:
    vocoder = disturbed(music_dcae().vocoder)
    mel = torch.randn(1, BANDS, 2, generator=torch.Generator().manual_seed(0))
    actual = vocoder(mel)
    assert actual.shape == (1, 1, 2 * HOP)
    expected = played(in_float64(vocoder), mel[0].double().numpy())
    np.testing.assert_allclose(actual[0, 0].numpy(), expected, atol=1e-4)
    assert expected.std() > 1e-3


@torch.no_grad()
def test_latents_are_the_autoencoders_of_both_sides_as_one_picture() -> None:
    vae = music_dcae().eval()
    waveforms = torch.stack([chord(number, 3 * 4096 / RATE, RATE) for number in (0, 1)])
    dcae = AutoencoderDC(**DCAE).eval()
    dcae.load_state_dict(vae.dcae.state_dict())
    pictures = np.stack([[log_mel(side.double().numpy()) for side in waveform] for waveform in waveforms])
    expected = dcae.encoder(torch.from_numpy((pictures + 11) / 7 - 1).float())
    actual = vae.encode(waveforms).latent
    assert actual.shape == (2, 2, 16, 3)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)

    decoded = vae.decode(actual).sample
    mel = dcae.decoder(actual) * 7 - 4
    assert decoded.shape == waveforms.shape
    for side in range(2):
        torch.testing.assert_close(decoded[:, side], vae.vocoder(mel[:, side])[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_both_ways_compute_in_fp32_whatever_the_run_does() -> None:
    vae = music_dcae().eval()
    waveform = chord(0, 4096 / RATE, RATE).unsqueeze(0)
    latents = vae.encode(waveform).latent
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(waveform).latent, latents)
        assert vae.decode(latents.bfloat16()).sample.dtype == torch.float32


def test_a_folder_in_bf16_is_read_in_fp32(tmp_path: Any) -> None:
    music_dcae().save_pretrained(tmp_path)
    loaded = MusicDCAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, tensor in music_dcae().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"upsample_rates are \(8, 8\); their product must be hop_length, 512"):
        ADaMoSHiFiGANV1(upsample_rates=(8, 8), upsample_kernel_sizes=(16, 16))
    with pytest.raises(ValueError, match="sampling_rate is 48000; the vocoder is for 44100 samples per second"):
        MusicDCAE(DCAE, VOCODER, 48_000)


def test_names_and_shapes_of_the_vocoder_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        vocoder = ADaMoSHiFiGANV1()
    assert {name: tuple(tensor.shape) for name, tensor in vocoder.state_dict().items()} == dict(published_shapes())


def published_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    widths = (128, 256, 384, 512)
    yield from plain("backbone.channel_layers.0.0", 128, 128, 7)
    yield from plain("backbone.channel_layers.0.1", 128)
    for stage, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
        yield from plain(f"backbone.channel_layers.{stage}.0", narrow)
        yield from plain(f"backbone.channel_layers.{stage}.1", wide, narrow, 1)
    for stage, (depth, width) in enumerate(zip((3, 3, 9, 3), widths, strict=True)):
        for number in range(depth):
            name = f"backbone.stages.{stage}.{number}"
            yield from plain(f"{name}.dwconv", width, 1, 7)
            yield from plain(f"{name}.norm", width)
            yield from plain(f"{name}.pwconv1", 4 * width, width)
            yield from plain(f"{name}.pwconv2", width, 4 * width)
            yield f"{name}.gamma", (width,)
    yield from plain("backbone.norm", 512)
    yield from normed("head.conv_pre", 1024, 1024, 512, 13)
    channels = 1024
    for step, kernel in enumerate((8, 8, 4, 4, 4, 4, 4)):
        channels //= 2
        yield from normed(f"head.ups.{step}", channels, 2 * channels, channels, kernel)
        for number, size in enumerate((3, 7, 11, 13), start=4 * step):
            for group in ("convs1", "convs2"):
                for pair in range(3):
                    yield from normed(f"head.resblocks.{number}.{group}.{pair}", channels, channels, channels, size)
    yield from normed("head.conv_post", 1, 1, channels, 13)


def plain(name: str, outputs: int, *inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)


def normed(name: str, outputs: int, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight_v", shape
    yield f"{name}.weight_g", (shape[0], 1, 1)
    yield f"{name}.bias", (outputs,)


def test_the_published_autoencoder_makes_a_latent_of_4096_samples() -> None:
    with torch.device("meta"):
        vae = MusicDCAE(PUBLISHED_DCAE, {})
        latent: Tensor = vae.dcae.encoder(torch.empty(1, 2, BANDS, 16))
    assert vae.samples_per_latent == 4096
    assert latent.shape == (1, 8, 16, 2)
