"""A control network for HiDream-I1, of our own: none was published.

Copies of the base's first blocks of two streams, at most four, with their experts. The first is given what the base's first block is
given, and patches of the conditioning picture's latents through a layer of zeros; what comes out of a copy goes through a layer of
zeros of its own and is added behind several of the base's blocks, those of one stream too. Each copy is told of the layer of Llama
that its original is told of, as the base projects it. Modules are named as diffusers names those of its networks.

The experts are differentiable in training mode alone, those of the base too, as gradients go through them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_hidream_image import HiDreamBlock, HiDreamImageTransformerBlock
from torch import Tensor, nn

from atelier_runtime.control import copied_blocks
from atelier_runtime.family_parts.packing import packed
from atelier_runtime.networks.steering import Call, SteeringModel, zero_linear

COPIED = 4
TEXT_STREAM = ("attn1.to_q_t", "attn1.to_out_t", "attn1.q_rms_norm_t", "ff_t")
"""What only a block's text stream comes out of."""
SAME = (
    *("num_attention_heads", "attention_head_dim", "num_routed_experts", "num_activated_experts"),
    *("in_channels", "patch_size"),
)
"""What a network's config has of its base's."""
TOLD = ("hidden_states", "hidden_states_masks", "temb", "image_rotary_emb")


class HiDreamImageControlNetModel(SteeringModel):
    """Arguments but `num_layers` are those of the base's config."""

    @register_to_config
    def __init__(
        self,
        num_layers: int = COPIED,
        num_attention_heads: int = 20,
        attention_head_dim: int = 128,
        num_routed_experts: int = 4,
        num_activated_experts: int = 2,
        in_channels: int = 16,
        patch_size: int = 2,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = (num_attention_heads, attention_head_dim, num_routed_experts, num_activated_experts)
        self.double_stream_blocks = nn.ModuleList(
            HiDreamBlock(HiDreamImageTransformerBlock(width, *sizes)) for _ in range(num_layers)
        )
        self.controlnet_x_embedder = zero_linear(in_channels * patch_size**2, width)
        self.controlnet_blocks = nn.ModuleList(zero_linear(width, width) for _ in range(num_layers))
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(cls, base: Any) -> "HiDreamImageControlNetModel":
        config = base.config
        if not config.num_layers:
            raise ValueError("a base without blocks of two streams has none to copy")
        layers = copied_blocks(config.num_layers + config.num_single_layers, min(COPIED, config.num_layers))
        network = cls(num_layers=layers, **{name: config[name] for name in SAME})
        network.double_stream_blocks.load_state_dict(base.double_stream_blocks[:layers].state_dict())
        return network

    @property
    def unused(self) -> tuple[str, ...]:
        last = len(self.double_stream_blocks) - 1
        return tuple(f"double_stream_blocks.{last}.block.{name}" for name in TEXT_STREAM)

    def steered_blocks(self, base: Any) -> list[nn.Module]:
        return [*base.double_stream_blocks, *base.single_stream_blocks]

    def told(self, base: Any, asked: Call, first: Call, output: Any, condition: Tensor) -> Call:
        layers, projections = asked["encoder_hidden_states_llama3"], base.caption_projection
        numbers = base.config.llama_layers[: len(self.double_stream_blocks)]
        own = [projections[block](layers[number]) for block, number in enumerate(numbers)]
        text = first["encoder_hidden_states"]
        common = text[:, : text.shape[1] - own[0].shape[1]]  # behind it comes the first block's own layer
        shared = {name: first[name] for name in TOLD}
        return {"controlnet_cond": condition, "encoder_hidden_states": common, "own_states": own, **shared}

    def joined(self, output: Any, addition: Tensor) -> Any:
        if isinstance(output, tuple):
            tokens, text = output
            return tokens + addition, text
        return output + F.pad(addition, (0, 0, 0, output.shape[1] - addition.shape[1]))  # text comes last

    def forward(
        self,
        hidden_states: Tensor,
        hidden_states_masks: Tensor | None,
        encoder_hidden_states: Tensor,
        own_states: Sequence[Tensor],
        temb: Tensor,
        image_rotary_emb: Tensor,
        controlnet_cond: Tensor,
    ) -> list[Tensor]:
        """[B, tokens, width] of each copy. `controlnet_cond` [B, C, H, W]; all else is the base's.

        `own_states`: for each copy the text [B, text tokens, width] that it alone is told, behind `encoder_hidden_states`.
        """
        condition = self.controlnet_x_embedder(packed(controlnet_cond, self.config.patch_size).to(hidden_states.dtype))
        # A picture that is not square is padded to the canvas.
        padding = hidden_states.shape[1] - condition.shape[1]
        states, text, outputs = hidden_states + F.pad(condition, (0, 0, 0, padding)), encoder_hidden_states, []
        for block, after, own in zip(self.double_stream_blocks, self.controlnet_blocks, own_states, strict=True):
            told = torch.cat([text, own], dim=1)
            states, text = self.called(block, states, hidden_states_masks, told, temb, image_rotary_emb)
            text = text[:, : encoder_hidden_states.shape[1]]
            outputs.append(after(states))
        return outputs
