"""ACE-Step v1, text to music: flow matching on latents of a spectrogram, with attention to a caption and to lyrics.

Latents [B, 8, 16, T], 10.8 columns a second at 44.1 kHz, of diffusers' deep compression autoencoder over the log-mel spectrograms of
both sides; outside the network, channels and rows are one axis of 128. Time 0..1000 at the network's door. Text: UMT5, at most 256
tokens; lyrics as tokens of a vocabulary of their own, which the network encodes itself; no voice, as the published weights know none.
A dropped caption is one token of zeros without lyrics, which guidance contrasts with. The network normalises over the whole length, so
each sample of a batch runs alone, at its own. Source: `atelier_runtime/networks/ace_step_v1_pipeline.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import (
    Blocks,
    Conditions,
    Family,
    Features,
    Latents,
    SampleRequest,
    Song,
    TimeEmbedder,
    configuration,
)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "linear_q", "linear_k", "linear_v")
MLP = ("inverted_conv.conv", "point_conv.conv", "w_1", "w_2")  # without the convolution in time between the first two
UNUSED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class AceStepV1(Family):
    """Text to music with the first generation of ACE-Step."""

    name = "ace_step_v1"
    pipeline = "ACEStepPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("lyric_encoder.encoders", "text"), Blocks("transformer_blocks"))
    time_embedder = TimeEmbedder("timestep_embedder", "time_proj", scale=1000)
    frozen_parameters = (r"speaker_embedder\.weight",)  # its input is zeros

    def dead_modules(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Layers of the published network that it never calls, and those that only the maker's training compares."""
        linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        return tuple(name for name in linear if name.startswith("projectors.") or name.endswith(UNUSED))

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """Features of instrumental pieces, which is what the pipeline makes of a prompt alone."""
        return self.encode_songs(pipe, [Song(prompt, "", 60.0) for prompt in prompts])

    def encode_songs(self, pipe: Any, songs: Sequence[Song | None]) -> list[Features]:
        """`embeds` [L, 768], `mask` [L], all true, `lyrics` [N] tokens, `sung` [N], all true or one that is false.

        After padding in a batch the two masks tell the true lengths. Raises ConfigError for lyrics that the model cannot be told.
        """
        return [_features(pipe, song) for song in songs]

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents [B, 128, T] of waveforms [B, 2, 4096 T] in [-1, 1]."""
        return Latents(mean=pipe.latents_of(pixels).flatten(1, 2))

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 128, T]; zeros behind a sample's own length.

        As many calls as samples whatever their lengths, since under sharding all ranks must call equally often.
        """
        config = configuration(denoiser)
        text, whole = conditions.text, noisy.shape[-1]
        lengths = [whole] * len(noisy) if conditions.lengths is None else conditions.lengths.tolist()
        counts = zip(lengths, text["mask"].sum(dim=1).tolist(), text["sung"].sum(dim=1).tolist(), strict=True)
        outputs = []
        for one, (length, tokens, words) in enumerate(counts):
            sample, seen = slice(one, one + 1), slice(max(words, 1))
            [output] = denoiser(
                hidden_states=noisy[sample, :, :length].reshape(1, config.in_channels, -1, length),
                timestep=1000 * time[sample],
                encoder_text_hidden_states=text["embeds"][sample, :tokens],
                speaker_embeds=noisy.new_zeros(1, config.speaker_embedding_dim),
                lyric_token_idx=text["lyrics"][sample, seen],
                lyric_mask=text["sung"][sample, seen],
                return_dict=False,
            )
            outputs.append(nn.functional.pad(output.flatten(1, 2), (0, whole - length)))
        return torch.cat(outputs)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Raises ConfigError for lyrics that the model cannot be told."""
        _lyrics(pipe, request.lyrics)
        arguments = {
            "prompt": request.prompt,
            "lyrics": request.lyrics,
            "audio_duration": float(request.seconds),
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "generator": request.generator,
        }
        return {key: value for key, value in arguments.items() if value is not None}


def _features(pipe: Any, song: Song | None) -> Features:
    embeds = pipe.without_caption() if song is None else pipe.encode_prompt(song.caption)
    lyrics, sung = _lyrics(pipe, "" if song is None else song.lyrics)
    mask = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
    return {"embeds": embeds[0], "mask": mask, "lyrics": lyrics[0], "sung": sung[0]}


def _lyrics(pipe: Any, lyrics: str) -> tuple[Tensor, Tensor]:
    try:
        tokens, sung = pipe.encode_lyrics(lyrics)
    except ValueError as error:
        raise ConfigError(f"{error}; change the file of the lyrics, or spec.validation.prompts") from error
    return tokens, sung


FAMILY = AceStepV1()
