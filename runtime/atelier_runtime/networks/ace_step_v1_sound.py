"""What ACE-Step v1 hears and makes music with: log-mel spectrograms, diffusers' autoencoder over them, and a vocoder.

A waveform becomes two spectrograms, one for each side, which the deep compression autoencoder of Sana takes as a picture with two
channels. Back, the vocoder makes a waveform of each. All of it computes in fp32 whatever the run's precision: it is small, and the
spectrum of what is quiet is lost in bf16. Module names are those of the published checkpoint, see docs/models/ace-step-v1.md.
Facts: https://github.com/ace-step/ACE-Step (Apache-2.0), arXiv:2010.05646 (HiFi-GAN), arXiv:2201.03545 (ConvNeXt).

Letters in shapes: B batch, M mel bands, F frames of a spectrogram, N samples of a waveform.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from diffusers import AutoencoderDC
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from atelier_runtime.networks.attention import without_autocast

EPSILON = 1e-6
QUIETEST = 1e-5
"""Of a mel band, in front of the logarithm."""
LOG_MEL_RANGE = (-11.0, 3.0)
"""What the autoencoder takes as -1 and 1."""
DILATIONS = (1, 3, 5)


class MusicDCAE(ModelMixin, ConfigMixin):
    """Waveforms on two channels to latents [B, 8, 16, N / 4096] and back.

    `dcae_config` and `vocoder_config` are those of the two, as far as they are no defaults. `sampling_rate`, in samples per second, is
    the vocoder's.
    """

    _keep_in_fp32_modules = ["dcae", "vocoder"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self, dcae_config: Mapping[str, Any], vocoder_config: Mapping[str, Any], sampling_rate: int = 44_100
    ) -> None:
        super().__init__()
        self.dcae = AutoencoderDC(**own(dcae_config))
        self.vocoder = ADaMoSHiFiGANV1(**own(vocoder_config))
        if self.vocoder.config.sampling_rate != sampling_rate:
            raise ValueError(
                f"sampling_rate is {sampling_rate}; the vocoder is for {self.vocoder.config.sampling_rate} samples per second"
            )

    @property
    def samples_per_latent(self) -> int:
        """Samples of a waveform for each column of latents."""
        return self.vocoder.config.hop_length * self.dcae.spatial_compression_ratio

    def encode(self, waveforms: Tensor) -> EncoderOutput:
        """Latents of waveforms [B, 2, N] in [-1, 1]; N is a multiple of `samples_per_latent`."""
        with without_autocast(waveforms.device.type):
            low, high = LOG_MEL_RANGE
            mel = self.vocoder.log_mel(waveforms.float())
            return EncoderOutput(latent=self.dcae.encode(2 * (mel - low) / (high - low) - 1).latent)

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Waveforms [B, 2, N] in [-1, 1] of latents."""
        with without_autocast(latents.device.type):
            low, high = LOG_MEL_RANGE
            mel = (self.dcae.decode(latents.float()).sample + 1) / 2 * (high - low) + low
            # One side at a time, as it takes much memory for each sample.
            return DecoderOutput(sample=torch.cat([self.vocoder(side) for side in mel.unbind(1)], dim=1))


class ADaMoSHiFiGANV1(ModelMixin, ConfigMixin):
    """The published vocoder, of spectrograms of one channel. Arguments are those of its `config.json` that have a part here."""

    _keys_to_ignore_on_load_unexpected = [r"mel_transform\."]  # noqa: RUF012
    """Buffers of the published file that are made here: a window, and the filters of the mel bands."""

    @register_to_config
    def __init__(
        self,
        input_channels: int = 128,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (128, 256, 384, 512),
        kernel_sizes: Sequence[int] = (7,),
        upsample_rates: Sequence[int] = (4, 4, 2, 2, 2, 2, 2),
        upsample_kernel_sizes: Sequence[int] = (8, 8, 4, 4, 4, 4, 4),
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11, 13),
        upsample_initial_channel: int = 1024,
        pre_conv_kernel_size: int = 13,
        post_conv_kernel_size: int = 13,
        sampling_rate: int = 44_100,
        n_fft: int = 2048,
        hop_length: int = 512,
        f_min: float = 40.0,
        f_max: float = 16_000.0,
    ) -> None:
        super().__init__()
        if math.prod(upsample_rates) != hop_length:
            raise ValueError(
                f"upsample_rates are {tuple(upsample_rates)}; their product must be hop_length, {hop_length}"
            )
        self.backbone = ConvNeXtBackbone(input_channels, depths, dims, kernel_sizes[0])
        self.head = HiFiGANGenerator(
            (dims[-1], upsample_initial_channel),
            upsample_rates,
            upsample_kernel_sizes,
            resblock_kernel_sizes,
            ends=(pre_conv_kernel_size, post_conv_kernel_size),
        )

    def forward(self, mel: Tensor) -> Tensor:
        """Waveforms [B, 1, N] in (-1, 1) of log-mel spectrograms [B, M, F]; N = `hop_length` * F."""
        return self.head(self.backbone(mel))

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """Log-mel spectrograms [..., M, F] of waveforms [..., N] in fp32; F = N / `hop_length`.

        A frame is `n_fft` samples under Hann's window; the waveform is reflected at its ends, so that the first frame has its middle
        half of a hop behind the start.
        """
        config, device = self.config, waveforms.device
        around = config.n_fft - config.hop_length
        padded = functional.pad(waveforms.flatten(0, -2), (around // 2, around - around // 2), mode="reflect")
        window = torch.hann_window(config.n_fft, device=device)
        spectrum = torch.stft(padded, config.n_fft, config.hop_length, window=window, center=False, return_complex=True)
        loudness = torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + EPSILON)
        bands = torch.from_numpy(
            mel_filter_bank(
                num_frequency_bins=config.n_fft // 2 + 1,
                num_mel_filters=config.input_channels,
                min_frequency=config.f_min,
                max_frequency=config.f_max,
                sampling_rate=config.sampling_rate,
                norm="slaney",
                mel_scale="slaney",
            )
        ).to(device, torch.float32)
        mel = (bands.T @ loudness).clamp(min=QUIETEST).log()
        return torch.unflatten(mel, 0, waveforms.shape[:-1])


class ConvNeXtBackbone(nn.Module):
    """Mel bands to features, a frame each: stages of equal blocks, in front of each a change of width."""

    def __init__(self, bands: int, depths: Sequence[int], widths: Sequence[int], kernel: int) -> None:
        super().__init__()
        stem = nn.Conv1d(bands, widths[0], kernel, padding=kernel // 2, padding_mode="replicate")
        self.channel_layers = nn.ModuleList([nn.Sequential(stem, ChannelNorm(widths[0]))])
        for narrow, wide in itertools.pairwise(widths):
            self.channel_layers.append(nn.Sequential(ChannelNorm(narrow), nn.Conv1d(narrow, wide, 1)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, kernel) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = ChannelNorm(widths[-1])

    def forward(self, frames: Tensor) -> Tensor:
        for change, stage in zip(self.channel_layers, self.stages, strict=True):
            frames = stage(change(frames))
        return self.norm(frames)


class ConvNeXtBlock(nn.Module):
    """A convolution within each channel, then two linear layers over the channels of each frame, scaled and added."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), EPSILON))

    def forward(self, frames: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(frames).transpose(1, 2))
        return frames + (self.gamma * self.pwconv2(functional.gelu(self.pwconv1(inner)))).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of [B, C, F]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPSILON)

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames.transpose(1, 2)).transpose(1, 2)


class HiFiGANGenerator(nn.Module):
    """Features of frames to a waveform: steps that lengthen it, behind each the mean of blocks that see parts of different size."""

    def __init__(
        self,
        widths: tuple[int, int],
        rates: Sequence[int],
        kernels: Sequence[int],
        block_kernels: Sequence[int],
        *,
        ends: tuple[int, int],
    ) -> None:
        """`widths`: channels of the features, and behind the first convolution. `ends`: kernels of the first and the last."""
        super().__init__()
        channels = widths[1]
        self.conv_pre = NormedConvolution(*widths, ends[0])
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(rates, kernels, strict=True):
            self.ups.append(NormedLengthening(channels, channels // 2, kernel, rate))
            channels //= 2
            self.resblocks.extend(ResidualBlock(channels, each) for each in block_kernels)
        self.conv_post = NormedConvolution(channels, 1, ends[1])

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.conv_pre(frames)
        abreast = len(self.resblocks) // len(self.ups)
        for step, lengthen in enumerate(self.ups):
            hidden = lengthen(functional.silu(hidden))
            blocks = self.resblocks[abreast * step : abreast * (step + 1)]
            # Added up one by one: at the full rate each result takes hundreds of megabytes a minute.
            hidden = reduce(torch.add, (block(hidden) for block in blocks)) / abreast
        return torch.tanh(self.conv_post(functional.silu(hidden)))


class ResidualBlock(nn.Module):
    """Pairs of convolutions, the first of each over samples that lie apart, added to their input."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(NormedConvolution(channels, channels, kernel, apart) for apart in DILATIONS)
        self.convs2 = nn.ModuleList(NormedConvolution(channels, channels, kernel) for _ in DILATIONS)

    def forward(self, hidden: Tensor) -> Tensor:
        for apart, near in zip(self.convs1, self.convs2, strict=True):
            hidden = hidden + near(functional.silu(apart(functional.silu(hidden))))
        return hidden


class Normed(nn.Module):
    """A kernel as length and direction, each first index of its own (arXiv:1602.07868): `weight_g` and `weight_v`."""

    def __init__(self, shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.randn(shape) * 0.01)
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(1, 2), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))


class NormedConvolution(Normed):
    """Keeps the length. Neighbours in the kernel are `apart` samples from each other."""

    def __init__(self, inputs: int, outputs: int, kernel: int, apart: int = 1) -> None:
        super().__init__((outputs, inputs, kernel), outputs)
        self.apart = apart

    def forward(self, samples: Tensor) -> Tensor:
        around = self.apart * (self.weight_v.shape[-1] - 1) // 2
        return functional.conv1d(samples, self.weight, self.bias, padding=around, dilation=self.apart)


class NormedLengthening(Normed):
    """Makes it `rate` times as long."""

    def __init__(self, inputs: int, outputs: int, kernel: int, rate: int) -> None:
        super().__init__((inputs, outputs, kernel), outputs)
        self.rate = rate

    def forward(self, samples: Tensor) -> Tensor:
        cut = (self.weight_v.shape[-1] - self.rate) // 2
        return functional.conv_transpose1d(samples, self.weight, self.bias, stride=self.rate, padding=cut)


def own(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers keeps beside the arguments."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
