"""A tiny real pipeline per family: stock diffusers and transformers classes with random weights, no download, under a second each.

Weights are seeded, so two calls give the same pipeline. Resolution 32 or 64 px is meant: the autoencoders reduce by 8.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

Module = TypeVar("Module", bound=nn.Module)
TEXT_TOKENS = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_pipeline(family: str) -> Any:
    """The family's stock pipeline, fp32 on the CPU, in eval mode."""
    pipe = TINY[family]()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


def save_tiny(family: str, folder: Path) -> Path:
    """Writes the family's tiny checkpoint, laid out as a hub repository; gives the folder."""
    tiny_pipeline(family).save_pretrained(folder)
    return folder


def seeded(build: Callable[[], Module]) -> Module:
    """A module from a fixed seed, with what a random model must not have replaced by N(0, 0.02).

    All-zero matrices (zero-initialised output layers) hide every gradient in front of them; tensors left uninitialised hold NaN.
    """
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        for tensor in module.parameters():
            if not tensor.isfinite().all() or (tensor.ndim > 1 and not tensor.any()):
                tensor.normal_(0, 0.02)
    return module


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens, 16 long; the end token is its last, as in the published vocabulary."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_TOKENS)


def clip_config(width: int, projection: int) -> CLIPTextConfig:
    end = len(LETTERS) * 2 + 1
    return CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=projection,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )


def t5_tokenizer() -> T5Tokenizer:
    """Letters as tokens, 16 long."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=TEXT_TOKENS)


def t5_encoder(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(lambda: T5EncoderModel(config))


def kl_autoencoder(latent_channels: int, scale: float, shift: float | None) -> AutoencoderKL:
    blocks = 4
    return seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            scaling_factor=scale,
            shift_factor=shift,
            use_quant_conv=shift is None,
            use_post_quant_conv=shift is None,
        )
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    clip_width, t5_width = 16, 40
    return StableDiffusion3Pipeline(
        transformer=seeded(
            lambda: SD3Transformer2DModel(
                sample_size=8,
                in_channels=16,
                out_channels=16,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=t5_width,
                caption_projection_dim=32,
                pooled_projection_dim=2 * clip_width,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(16, 1.5305, 0.0609),
        text_encoder=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, clip_width))),
        tokenizer=clip_tokenizer(),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, clip_width))),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(t5_width),
        tokenizer_3=t5_tokenizer(),
    )


def tiny_flux() -> FluxPipeline:
    clip_width, t5_width = 16, 24
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=kl_autoencoder(16, 0.3611, 0.1159),
        text_encoder=seeded(lambda: CLIPTextModel(clip_config(clip_width, clip_width))),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(t5_width),
        tokenizer_2=t5_tokenizer(),
        transformer=seeded(
            lambda: FluxTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=t5_width,
                pooled_projection_dim=clip_width,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        ),
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    clip_width, projection = 16, 24
    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(4, 0.13025, None),
        text_encoder=seeded(lambda: CLIPTextModel(clip_config(clip_width, clip_width))),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip_config(clip_width, projection))),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=seeded(
            lambda: UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=(2, 2),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=2 * clip_width,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + projection,
            )
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


TINY: dict[str, Callable[[], Any]] = {"sd3": tiny_sd3, "flux": tiny_flux, "sdxl": tiny_sdxl}
try:
    from tiny_families_more import TINY_MORE
except ModuleNotFoundError:
    pass
else:
    TINY |= TINY_MORE
