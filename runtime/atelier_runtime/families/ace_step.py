"""ACE-Step 1.5, text to music: flow matching on latents of a stereo waveform, with cross-attention to caption, lyrics and timbre.

Latents [B, 64, T], 25 a second at 48 kHz, of `AutoencoderOobleck`, neither scaled nor shifted; the network wants time before channels.
Time is sigma, twice: from it and to it. Beside the noise it gets the latents of silence, which stand for the music that another task
would start from, and ones where it is to play. Text: a template with caption and length through Qwen3, lyrics through its embeddings
alone; the pipeline's condition encoder joins both with the timbre of silence. Guidance contrasts with a learnt vector, not with an
empty prompt. The network takes no mask, so each sample of a batch runs alone, at its own length in text and music. Source: diffusers'
`pipeline_ace_step.py`, `modeling_ace_step.py` and `ace_step_transformer.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Blocks, Conditions, Family, Features, Latents, SampleRequest, Song, TimeEmbedder

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("gate_proj", "up_proj", "down_proj")
TIMBRE_SECONDS = 30
"""Length of the sound that timbre is heard in."""


class AceStep(Family):
    """Text to music with base, SFT and turbo checkpoints."""

    name = "ace_step"
    pipeline = "AceStepPipeline"
    left_out = ("audio_tokenizer", "audio_token_detokenizer")
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("layers"),)
    # Not `time_embed_r`, of the way between both times, which checkpoints know from training with a way of 0.
    time_embedder = TimeEmbedder("time_embed")
    shares = True

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """Features of instrumental pieces of a minute, which is what the pipeline makes of a prompt alone."""
        return self.encode_songs(pipe, [Song(prompt, "", 60.0) for prompt in prompts])

    def encode_songs(self, pipe: Any, songs: Sequence[Song | None]) -> list[Features]:
        """`embeds` [L, width of the condition encoder], and `mask` [L], all true: after padding in a batch it tells the true length.

        One at a time, as the text encoder sees no mask. Of None the learnt vector alone: the pipeline repeats it to the other's
        length, and attention over copies gives what it gives over one.
        """
        features = []
        for song in songs:
            embeds = pipe.condition_encoder.null_condition_emb if song is None else _condition(pipe, song)
            mask = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
            features.append({"embeds": embeds[0], "mask": mask})
        return features

    def encode_shared(self, pipe: Any) -> Features:
        """`silence` [T, 64]: ten minutes of it as latents, kept by the condition encoder."""
        return {"silence": pipe.condition_encoder.silence_latent[0]}

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        """Latents [B, 64, T] of waveforms [B, 2, 1920 T] in [-1, 1]."""
        posterior = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist
        return Latents(mean=posterior.mean, std=posterior.std)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 64, T]; zeros behind a sample's own length.

        As many calls as samples whatever their lengths, since under sharding all ranks must call equally often.
        """
        model: Any = getattr(denoiser, "module", denoiser)
        text, whole = conditions.text, noisy.shape[-1]
        lengths = [whole] * len(noisy) if conditions.lengths is None else conditions.lengths.tolist()
        time = time.to(next(model.parameters()).dtype)  # as when sampling: rounded where the weights are bf16
        silence = conditions.shared["silence"].to(noisy.dtype)
        outputs = []
        for one, (length, tokens) in enumerate(zip(lengths, text["mask"].sum(dim=1).tolist(), strict=True)):
            sample = slice(one, one + 1)
            source = silence.repeat(-(-length // len(silence)), 1)[None, :length]
            [output] = denoiser(
                hidden_states=noisy[sample, :, :length].transpose(1, 2),
                timestep=time[sample],
                timestep_r=time[sample],
                encoder_hidden_states=text["embeds"][sample, :tokens],
                context_latents=torch.cat([source, torch.ones_like(source)], dim=-1),
                return_dict=False,
            )
            outputs.append(nn.functional.pad(output.transpose(1, 2), (0, whole - length)))
        return torch.cat(outputs)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Raises ConfigError for a guidance that a distilled checkpoint would ignore, whatever flavour the run names."""
        if pipe.is_turbo and request.guidance is not None and request.guidance > 1:
            raise ConfigError(
                f"spec.validation.guidance is {request.guidance:g}, and the checkpoint of spec.model.source is distilled on guidance "
                "and ignores it; remove it"
            )
        arguments = {
            "prompt": request.prompt,
            "lyrics": request.lyrics,
            "audio_duration": float(request.seconds),
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "generator": request.generator,
        }
        return {key: value for key, value in arguments.items() if value is not None}


def _condition(pipe: Any, song: Song) -> Tensor:
    """[1, L, width]: what the pipeline tells its network of a piece without a sound to take the timbre from."""
    device, dtype = pipe.text_encoder.device, pipe.condition_encoder.dtype
    text, text_mask, lyrics, lyrics_mask = pipe.encode_prompt(
        song.caption, song.lyrics, device, audio_duration=song.seconds
    )
    frames = math.ceil(TIMBRE_SECONDS * pipe.latents_per_second)
    embeds, _ = pipe.condition_encoder(
        text_hidden_states=text,
        text_attention_mask=text_mask,
        lyric_hidden_states=lyrics,
        lyric_attention_mask=lyrics_mask,
        refer_audio_acoustic_hidden_states_packed=pipe.condition_encoder.silence_latent[:, :frames].to(dtype),
        refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
    )
    return embeds


FAMILY = AceStep()
