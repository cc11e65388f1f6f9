"""Chroma 1: Flux's two kinds of blocks, modulated by one small network in place of a layer in each block.

Latents [B, 16, H/8, W/8] of Flux's autoencoder enter as 2 x 2 patches, [B, HW/256, 64]; time is sigma itself. No guidance is
embedded. Text: T5, 512 tokens, which sees its own padding masked. The transformer's mask is 1 for the caption and the first padding
token, 0 for the rest, and the pipeline has it as floats, which attention adds to its logits: the padding is weighed down and not
hidden, so the length is part of the model. Source: diffusers' `pipeline_chroma.py` and `transformer_chroma.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest, TimeEmbedder
from atelier_runtime.lora_layout import ADDED_QUERY_KEY_VALUE, QUERY_KEY_VALUE, THIRDS, LoraLayout, fused, plain

T5_TOKENS = 512  # default of the pipeline's `max_sequence_length`
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")

_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
LAYOUT = LoraLayout(
    architecture="chroma",
    flat=True,
    rules=(
        *fused(_DOUBLE + r"attn\.", QUERY_KEY_VALUE, r"double_blocks.\1.img_attn.qkv", THIRDS),
        *fused(_DOUBLE + r"attn\.", ADDED_QUERY_KEY_VALUE, r"double_blocks.\1.txt_attn.qkv", THIRDS),
        *fused(
            _SINGLE,
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            r"single_blocks.\1.linear1",
            (1, 1, 1, 4),
        ),
        *plain(
            _DOUBLE,
            r"double_blocks.\1.",
            {
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
            },
        ),
        *plain(_SINGLE, r"single_blocks.\1.", {"proj_out": "linear2"}),
    ),
)
"""Flux's names, without those of the modulation, which the blocks lack. The stock pipeline's `load_lora_weights` reads it, `linear1`
at the published width only."""


class Chroma(Family):
    name = "chroma"
    pipeline = "ChromaPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("transformer_blocks", "text,tokens"), Blocks("single_transformer_blocks", "text|tokens"))
    time_embedder = TimeEmbedder("distilled_guidance_layer", "time_text_embed", scale=1000)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [512, 4096] and `mask` [512], true for the caption's tokens and the first padding token."""
        embeds, _, masks, *_ = pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=_t5_tokens(pipe)
        )
        return [{"embeds": one, "mask": mask.bool()} for one, mask in zip(embeds, masks, strict=True)]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        embeds = conditions.text["embeds"]
        rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        # Floats, as in the pipeline: true and false would hide the padding, which counts when sampling.
        mask = F.pad(conditions.text["mask"].to(noisy), (0, rows * columns), value=1.0)
        with _mask_in_recomputed_blocks(denoiser, mask):
            tokens = denoiser(
                hidden_states=F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
                timestep=time,
                encoder_hidden_states=embeds,
                txt_ids=noisy.new_zeros(embeds.shape[1], 3),
                img_ids=_positions(rows, columns, noisy),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        return super().sampling_arguments(pipe, request) | {"max_sequence_length": _t5_tokens(pipe)}


@contextmanager
def _mask_in_recomputed_blocks(denoiser: nn.Module, mask: Tensor) -> Iterator[None]:
    """Gives `mask` to the single blocks as well where activations are recomputed: diffusers forgets it there."""
    network: Any = getattr(denoiser, "module", denoiser)
    recompute = network._gradient_checkpointing_func
    single_blocks = set(network.single_transformer_blocks)

    def with_mask(block: Callable[..., Any], *arguments: Any) -> Any:
        if block in single_blocks:
            block = partial(block, attention_mask=mask)
        return recompute(block, *arguments)

    network._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        network._gradient_checkpointing_func = recompute


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows * columns, 3]: (0, row, column) of every token."""
    axes = [torch.arange(length, device=like.device) for length in (1, rows, columns)]
    return torch.cartesian_prod(*axes).to(like.dtype)


def _t5_tokens(pipe: Any) -> int:
    """Length that captions are padded to: the pipeline's default, or less where the tokenizer allows no more."""
    return min(T5_TOKENS, pipe.tokenizer.model_max_length)


FAMILY = Chroma()
