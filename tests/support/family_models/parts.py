"""Tiny parts that several families share: encoders, tokenizers, autoencoders of stock classes with random weights."""

import re
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from atelier_runtime.family_parts.vision_language import PictureReader

Module = TypeVar("Module", bound=nn.Module)
TEXT_TOKENS = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# The shape of the published template: a turn, and thinking that is left open where it is switched on.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


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


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level tokenizers use for bytes, in the order of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + n for n in range(256 - len(printable))]
    return [chr(code) for code in printable + others]


def chat_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, with turns and thinking."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = {piece: number for number, piece in enumerate([*byte_alphabet(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:], model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vision_language_encoder(width: int, vocabulary: int, layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL, of which text encoding uses the language model."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))


def add_words(tokenizer: Qwen2Tokenizer, template: str) -> None:
    """Makes tokens of the template's words: a template in bytes may be longer than what a pipeline keeps of it and the prompt."""
    tokenizer.add_tokens(sorted(set(re.findall(r"[A-Za-z]{3,}", template))))


def text_time_unet(
    text_width: int, pooled: int, *, depths: tuple[int, int] = (1, 2), **config: Any
) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion XL. `pooled` is the width of the vector for the whole text."""
    return seeded(
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
            transformer_layers_per_block=depths,
            cross_attention_dim=text_width,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + pooled,
            **config,
        )
    )


def euler_scheduler(**betas: Any) -> EulerDiscreteScheduler:
    """The sampler of Stable Diffusion XL, with the noise schedule of a checkpoint."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, beta_start=0.00085, **betas
    )


class Qwen2VLProcessor(PictureReader):
    """Under the name that published checkpoints have in `model_index.json`."""

    __module__ = "transformers"


def picture_reader(encoder: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """A processor for the encoder, which makes 4 to 12 tokens of a picture. Adds the tokens that stand around it and for it."""
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    limits = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}
    return Qwen2VLProcessor(Qwen2VLImageProcessorPil(size=limits), tokenizer)


def scale_references_down(pipelines: ModuleType) -> None:
    """Has the stock pipelines of a module scale pictures to a 256th of the area: 64 x 64 pixels where they ask for a megapixel.

    They cannot be asked, and a megapixel takes seconds in every test.
    """
    stock: Any = pipelines.calculate_dimensions
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def scaled(area: float, ratio: float) -> Any:
        return stock(area / 256, ratio)

    pipelines.calculate_dimensions = scaled  # type: ignore[attr-defined]
