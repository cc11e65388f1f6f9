"""Stable Diffusion 3 and 3.5: a flow transformer with a text and a picture stream in every block (arXiv:2403.03206).

Latents [B, 16, H/8, W/8], time 0..1000 at the network's door. Text: two CLIP encoders and T5, one after the other along the
sequence, padded and without mask, so the length is part of the model: 77 + 256. Source: diffusers' `pipeline_stable_diffusion_3.py`
and `transformer_sd3.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_runtime.control import Control, with_plain_config
from atelier_runtime.family import (
    Blocks,
    Conditions,
    Family,
    Features,
    Latents,
    SampleRequest,
    TimeEmbedder,
    configuration,
)
from atelier_runtime.lora_layout import ADDED_QUERY_KEY_VALUE, QUERY_KEY_VALUE, THIRDS, LoraLayout, fused, plain

T5_TOKENS = 256  # default of the pipeline's `max_sequence_length`
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

_DOUBLE = r"transformer_blocks\.(\d+)\."
LAYOUT = LoraLayout(
    architecture="stable-diffusion-3",
    flat=True,
    rules=(
        *fused(_DOUBLE + r"attn\.", QUERY_KEY_VALUE, r"joint_blocks.\1.x_block.attn.qkv", THIRDS),
        *fused(_DOUBLE + r"attn2\.", QUERY_KEY_VALUE, r"joint_blocks.\1.x_block.attn2.qkv", THIRDS),
        *fused(_DOUBLE + r"attn\.", ADDED_QUERY_KEY_VALUE, r"joint_blocks.\1.context_block.attn.qkv", THIRDS),
        *plain(
            _DOUBLE,
            r"joint_blocks.\1.",
            {
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
        ),
    ),
)
"""Query, key and value are one layer in the original repository. The stock pipeline cannot read it: diffusers has no converter, and
loads nothing without an error."""

CONTROL_BLOCKS = 12  # diffusers' default
TEXT_STREAM = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
"""What only a block's text stream comes out of."""


class JointControl(Control):
    """The first blocks; what comes out of one is added behind several of the base's. Of the text it is told the tokens alone.

    Source: diffusers' `controlnet_sd3.py`, `pipeline_stable_diffusion_3_controlnet.py` and `transformer_sd3.py`.
    """

    pipeline = "StableDiffusion3ControlNetPipeline"
    network = "SD3ControlNetModel"
    picture = "control_image"
    takes = "latents"

    def copied(self, base: Any) -> nn.Module:
        # At most half: the base takes output int(i / (blocks / outputs)) behind its block i, but none behind its last.
        blocks = min(CONTROL_BLOCKS, base.config.num_layers // 2)
        if not blocks:
            raise ValueError(f"a base of {base.config.num_layers} blocks has none to copy")
        from diffusers import SD3ControlNetModel

        return SD3ControlNetModel.from_transformer(
            with_plain_config(base), num_layers=blocks, num_extra_conditioning_channels=0
        )

    def unused(self, network: Any) -> tuple[str, ...]:
        last = len(network.transformer_blocks) - 1
        found = {name for name, _ in network.transformer_blocks[last].named_modules()} & set(TEXT_STREAM)
        # The weights of a layer that is given zeros.
        pooled = "time_text_embed.text_embedder.linear_1.weight"
        return (*(f"transformer_blocks.{last}.{name}" for name in sorted(found)), pooled)

    def predict(
        self, base: nn.Module, network: nn.Module, condition: Tensor, scale: float, *given: Any, **named: Any
    ) -> Any:
        told = named | {"pooled_projections": torch.zeros_like(named["pooled_projections"])}
        [samples] = network(*given, controlnet_cond=condition, conditioning_scale=scale, **told)
        return base(*given, block_controlnet_hidden_states=samples, **named)


class StableDiffusion3(Family):
    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    lora_layout = LAYOUT
    blocks = (Blocks("transformer_blocks", "text,tokens"),)
    time_embedder = TimeEmbedder("time_text_embed.timestep_embedder", "time_text_embed.time_proj", scale=1000)
    control = JointControl()

    def dead_modules(self, denoiser: nn.Module) -> tuple[str, ...]:
        """The last block drops its text stream, and with it what that stream's queries have gathered."""
        last = len(denoiser.get_submodule("transformer_blocks")) - 1  # type: ignore[arg-type]
        return (f"transformer_blocks.{last}.attn.add_q_proj",)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [77 + T5 tokens, 4096] and `pooled` [2048]; `embeds` [77, 2048] where the checkpoint comes without T5."""
        prompts = list(prompts)
        if pipe.text_encoder_3 is None:
            # `encode_prompt` asks the transformer for the width of its zeros, and no transformer is there while encoding: see
            # `predict`.
            encoded = [pipe._get_clip_prompt_embeds(prompts, clip_model_index=index) for index in (0, 1)]
            embeds, pooled = (torch.cat(parts, dim=-1) for parts in zip(*encoded, strict=True))
        else:
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=_t5_tokens(pipe)
            )
        return [{"embeds": one, "pooled": vector} for one, vector in zip(embeds, pooled, strict=True)]

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        embeds = conditions.text["embeds"]
        missing_width = configuration(denoiser).joint_attention_dim - embeds.shape[-1]
        if missing_width > 0:  # no T5: zeros in its place, as the pipeline has them
            embeds = F.pad(embeds, (0, missing_width, 0, T5_TOKENS))
        return denoiser(
            hidden_states=noisy,
            timestep=time * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=conditions.text["pooled"],
            return_dict=False,
            **conditions.controlled,
        )[0]

    def encode_condition(self, pipe: Any, pixels: Tensor) -> Latents:
        """Without the autoencoder's shift, which the pipeline leaves out for these networks."""
        latents, config = self.encode_pixels(pipe, pixels), pipe.vae.config
        return Latents(latents.mean + config.shift_factor * config.scaling_factor, latents.std)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        return super().sampling_arguments(pipe, request) | {"max_sequence_length": _t5_tokens(pipe)}


def _t5_tokens(pipe: Any) -> int:
    """Length that T5's tokens are padded to: the pipeline's default, or less where the tokenizer allows no more."""
    return T5_TOKENS if pipe.tokenizer_3 is None else min(T5_TOKENS, pipe.tokenizer_3.model_max_length)


FAMILY = StableDiffusion3()
