"""ACE-Step v1: its networks and its pipeline are ours, built here of tiny parts."""

from typing import Any

import torch
from diffusers import AutoencoderDC
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from atelier_runtime.networks import (
    ACEStepPipeline,
    ACEStepTransformer2DModel,
    ADaMoSHiFiGANV1,
    GranularEulerScheduler,
    MusicDCAE,
)
from family_models.kinds import Published, Tiny
from family_models.parts import LETTERS, seeded, t5_tokenizer

CHANNELS, ROWS = 2, 16
SPECIAL = ("[STOP]", "[UNK]", "[SPACE]", "[START]", "[en]", "[de]", "[zh-cn]", "[verse]", "[chorus]")
TRANSFORMER: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "speaker_embedding_dim": 6,
    "text_embedding_dim": 24,
    "lyric_encoder_vocab_size": 64,
    "lyric_hidden_size": 16,
    "ssl_latent_dims": (4, 6),
    "lyric_layers": 2,
    "lyric_heads": 2,
    "lyric_mlp_width": 24,
    "lyric_dropout": 0.0,
}
DCAE: dict[str, Any] = {
    "in_channels": 2,
    "latent_channels": CHANNELS,
    "attention_head_dim": 4,
    "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [4, 4, 8, 8],
    "decoder_block_out_channels": [4, 4, 8, 8],
    "encoder_layers_per_block": [1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}
VOCODER: dict[str, Any] = {
    "depths": [1, 1],
    "dims": [8, 12],
    "upsample_rates": [16, 8, 4],
    "upsample_kernel_sizes": [32, 16, 8],
    "resblock_kernel_sizes": [3, 5],
    "upsample_initial_channel": 16,
}


class AdaptiveProjectedGuidance:
    """The guidance of the pipeline for predictions [B, C * rows, T] of one sample, written out channel by channel."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def __call__(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        result = positive.clone()
        for channel in range(CHANNELS):
            rows = slice(channel * ROWS, (channel + 1) * ROWS)
            along = positive[0, rows].double()
            kept = along - negative[0, rows].double() - 0.75 * self._kept.get(channel, torch.zeros(()).double())
            self._kept[channel] = kept
            kept = kept / max(1.0, float(kept.square().sum().sqrt()) / 2.5)
            across = kept - (kept * along).sum() / along.square().sum() * along
            result[0, rows] += ((guidance - 1) * across).float()
        return result


def transformer() -> ACEStepTransformer2DModel:
    return seeded(lambda: ACEStepTransformer2DModel(**TRANSFORMER))


def music_dcae() -> MusicDCAE:
    vae = seeded(lambda: MusicDCAE(DCAE, VOCODER))
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith((".gamma", ".weight_g")):  # as small as they begin, they would leave silence of any sound
                parameter.fill_(1.0)
    return vae


def lyric_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and marks as tokens; the published one joins letters, too."""
    pieces = {piece: number for number, piece in enumerate([*SPECIAL, *LETTERS, *"0123456789[]-,'"])}
    tokenizer = Tokenizer(BPE(pieces, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny() -> ACEStepPipeline:
    encoder = UMT5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return ACEStepPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=seeded(lambda: UMT5EncoderModel(encoder)),
        lyric_tokenizer=lyric_tokenizer(),
        transformer=transformer(),
        vae=music_dcae(),
        scheduler=GranularEulerScheduler(shift=3.0),
    )


TINY = {
    "ace_step_v1": Tiny(
        tiny,
        to_grid=lambda _, latents: latents.flatten(1, 2),
        from_grid=lambda _, latents: latents.unflatten(1, (CHANNELS, ROWS)),
        combine_of_run=AdaptiveProjectedGuidance,
        negative=None,
        finish=lambda waveforms: waveforms,
        channels=CHANNELS * ROWS,
        seconds=10 * 4096 / 44_100,  # whole latents
    )
}

PUBLISHED_DCAE: dict[str, Any] = DCAE | {
    "latent_channels": 8,
    "attention_head_dim": 32,
    "encoder_block_out_channels": [128, 256, 512, 1024],
    "decoder_block_out_channels": [128, 256, 512, 1024],
    "encoder_layers_per_block": [2, 2, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [5], [5]],
    "scaling_factor": 0.41407,
}


def published_parts() -> dict[str, nn.Module]:
    """What the published repository has, by the name of its folder."""
    umt5 = UMT5Config(
        vocab_size=256384, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu"
    )
    return {
        "ace_step_transformer": ACEStepTransformer2DModel(),
        "music_dcae_f8c8": AutoencoderDC(**PUBLISHED_DCAE),
        "music_vocoder": ADaMoSHiFiGANV1(),
        "umt5-base": UMT5EncoderModel(umt5),
    }


PUBLISHED = Published(
    denoisers={"3.5b": (ACEStepTransformer2DModel, {})},
    encoders=lambda: [published_parts()["umt5-base"]],
    autoencoder=lambda: MusicDCAE(PUBLISHED_DCAE, {}),
    features=lambda: {
        "embeds": torch.empty(1, 256, 768, dtype=torch.bfloat16),
        "mask": torch.ones(1, 256, dtype=torch.bool, device="cpu"),
        "lyrics": torch.empty(1, 4096, dtype=torch.long),
        "sung": torch.ones(1, 4096, dtype=torch.bool, device="cpu"),
    },
)
