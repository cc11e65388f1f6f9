"""Flux.2: dev, which embeds its guidance, and klein, which contrasts with a second prediction."""

from typing import Any

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor, nn
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from family_models.kinds import Published, Tiny
from family_models.parts import chat_tokenizer, seeded
from family_models.scene import HEIGHT, WIDTH

TEXT_WIDTH = 16

# The shape of the published one: turns in brackets, the content a list of parts.
MISTRAL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>"
    "{% endfor %}"
)


def autoencoder() -> AutoencoderKLFlux2:
    vae = seeded(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=32
        )
    )
    # Those of a new batch norm would do nothing, whatever is done with them.
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def mistral(vocabulary: int) -> Mistral3ForConditionalGeneration:
    """The pipeline reads the hidden state 30."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": 31,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": None,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return seeded(lambda: Mistral3ForConditionalGeneration(config))


def qwen(vocabulary: int) -> Qwen3ForCausalLM:
    """The pipeline reads the hidden state 27."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=28,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    return seeded(lambda: Qwen3ForCausalLM(config))


def parts(*, guidance_embeds: bool) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        "vae": autoencoder(),
        "transformer": seeded(
            lambda: Flux2Transformer2DModel(
                num_layers=1,  # the text of 512 tokens is what takes the time
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * TEXT_WIDTH,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=guidance_embeds,
            )
        ),
    }


def tiny_dev() -> Flux2Pipeline:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return Flux2Pipeline(tokenizer=tokenizer, text_encoder=mistral(len(tokenizer)), **parts(guidance_embeds=True))


def tiny_klein() -> Flux2KleinPipeline:
    tokenizer = chat_tokenizer()
    return Flux2KleinPipeline(tokenizer=tokenizer, text_encoder=qwen(len(tokenizer)), **parts(guidance_embeds=False))


def to_grid(_: Any, packed: Tensor) -> Tensor:
    return packed.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))


def from_grid(_: Any, grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


TINY = {
    "flux2": Tiny(tiny_dev, to_grid=to_grid, from_grid=from_grid, guidance_off=2.5, combine=None, embedded=2.5),
    "flux2_klein": Tiny(tiny_klein, to_grid=to_grid, from_grid=from_grid),
}


def mistral_small() -> nn.Module:
    """Mistral Small 3.2, vision tower and output layer included."""
    return Mistral3ForConditionalGeneration(Mistral3Config(tie_word_embeddings=False))


def qwen3(width: int, mlp_width: int, *, tied: bool) -> nn.Module:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


KLEIN = {"guidance_embeds": False}
PUBLISHED = Published(
    denoisers={
        "dev": (Flux2Transformer2DModel, {}),
        "klein-base-9b": (
            Flux2Transformer2DModel,
            KLEIN
            | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 3 * 4096},
        ),
        "klein-base-4b": (
            Flux2Transformer2DModel,
            KLEIN
            | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560},
        ),
    },
    encoders=lambda: [mistral_small()],
    encoders_of={
        "klein-base-9b": lambda: [qwen3(4096, 12288, tied=False)],
        "klein-base-4b": lambda: [qwen3(2560, 9728, tied=True)],
    },
    autoencoder=AutoencoderKLFlux2,
)
