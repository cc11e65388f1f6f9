"""ACE-Step 1.5."""

from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.ace_step.pipeline_ace_step import SFT_GEN_PROMPT, TASK_INSTRUCTIONS
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from family_models.kinds import Published, Tiny
from family_models.parts import add_words, chat_tokenizer, seeded

CHANNELS = 4
RATIOS = (2, 4, 4, 6, 10)


class AdaptiveProjectedGuidance:
    """The guidance of the pipeline, which remembers the differences of earlier steps; of predictions [B, C, T]."""

    def __init__(self) -> None:
        self._momentum = MomentumBuffer(momentum=-0.75)

    def __call__(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        return normalized_guidance(
            pred_cond=positive.transpose(1, 2),
            pred_uncond=negative.transpose(1, 2),
            guidance_scale=guidance - 1.0,
            momentum_buffer=self._momentum,
            eta=0.0,
            norm_threshold=2.5,
            use_original_formulation=True,
            norm_dim=(1,),
        ).transpose(1, 2)


def as_loud_as_published(waveforms: Tensor) -> Tensor:
    """Each waveform with its peak at -1 dB."""
    return waveforms / waveforms.abs().amax(dim=(1, 2), keepdim=True) * 10 ** (-1 / 20)


def oobleck(latent_channels: int, multiples: tuple[int, ...]) -> AutoencoderOobleck:
    """It has twice as many channels at full rate as latents have."""
    return AutoencoderOobleck(
        encoder_hidden_size=2 * latent_channels,
        downsampling_ratios=list(RATIOS),
        channel_multiples=list(multiples),
        decoder_channels=2 * latent_channels,
        decoder_input_channels=latent_channels,
        audio_channels=2,
        sampling_rate=48_000,
    )


def condition_encoder(text_width: int) -> AceStepConditionEncoder:
    encoder = seeded(
        lambda: AceStepConditionEncoder(
            hidden_size=16,
            intermediate_size=24,
            text_hidden_dim=text_width,
            timbre_hidden_dim=CHANNELS,
            num_lyric_encoder_hidden_layers=2,
            num_timbre_encoder_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=8,
        )
    )
    # The converter puts real silence where a new encoder has zeros.
    encoder.silence_latent.normal_(generator=torch.Generator().manual_seed(1))
    return encoder


def tiny(**transformer: Any) -> AceStepPipeline:
    text_width = 32
    text = Qwen3Config(
        vocab_size=512,
        hidden_size=text_width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    tokenizer = chat_tokenizer()
    add_words(tokenizer, SFT_GEN_PROMPT + " ".join(TASK_INSTRUCTIONS.values()))
    return AceStepPipeline(
        vae=seeded(lambda: oobleck(CHANNELS, (1, 1, 1, 1, 1))),
        text_encoder=seeded(lambda: Qwen3Model(text)),
        tokenizer=tokenizer,
        transformer=seeded(
            lambda: AceStepTransformer1DModel(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                in_channels=3 * CHANNELS,
                audio_acoustic_hidden_dim=CHANNELS,
                sliding_window=4,
                encoder_hidden_size=16,
                **transformer,
            )
        ),
        condition_encoder=condition_encoder(text_width),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


TINY = {
    "ace_step": Tiny(
        tiny,
        to_grid=lambda _, latents: latents.transpose(1, 2),
        from_grid=lambda _, grid: grid.transpose(1, 2),
        combine_of_run=AdaptiveProjectedGuidance,
        noise="unit",
        negative=None,
        finish=as_loud_as_published,
        channels=CHANNELS,
    )
}

QWEN3_EMBEDDING = Qwen3Config(
    vocab_size=151669,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
XL = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "encoder_hidden_size": 2048,
}
PUBLISHED = Published(
    denoisers={
        "base": (AceStepTransformer1DModel, {}),
        "sft": (AceStepTransformer1DModel, {}),
        "xl-base": (AceStepTransformer1DModel, XL),
        "xl-turbo": (AceStepTransformer1DModel, XL | {"is_turbo": True}),
    },
    encoders=lambda: [Qwen3Model(QWEN3_EMBEDDING), AceStepConditionEncoder()],
    autoencoder=lambda: oobleck(64, (1, 2, 4, 8, 16)),
    features=lambda: {
        "embeds": torch.empty(1, 2305, 2048, dtype=torch.bfloat16),
        "mask": torch.ones(1, 2305, dtype=torch.bool, device="cpu"),
    },
    shared=lambda: {"silence": torch.empty(15_000, 64, dtype=torch.bfloat16)},
)
