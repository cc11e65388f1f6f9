"""A control network for AuraFlow, of our own: none was published.

Copies of the base's first blocks of two streams, at most four. The first is given what the base's first block is given, and patches of
the conditioning picture's latents through a layer of zeros; what comes out of a copy goes through a layer of zeros of its own and is
added behind several of the base's blocks, those of one stream too. Modules are named as diffusers names those of its networks.
"""

from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowJointTransformerBlock
from torch import Tensor, nn

from atelier_runtime.control import copied_blocks
from atelier_runtime.family_parts.packing import packed
from atelier_runtime.networks.steering import Call, SteeringModel, zero_linear

COPIED = 4
TEXT_STREAM = ("attn.add_q_proj", "attn.to_add_out", "ff_context")
"""What only a block's text stream comes out of."""


class AuraFlowControlNetModel(SteeringModel):
    """Arguments but `num_layers` are those of the base's config."""

    @register_to_config
    def __init__(
        self,
        num_layers: int = COPIED,
        num_attention_heads: int = 12,
        attention_head_dim: int = 256,
        in_channels: int = 4,
        patch_size: int = 2,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.joint_transformer_blocks = nn.ModuleList(
            AuraFlowJointTransformerBlock(width, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.controlnet_x_embedder = zero_linear(in_channels * patch_size**2, width)
        self.controlnet_blocks = nn.ModuleList(zero_linear(width, width) for _ in range(num_layers))
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(cls, base: Any) -> "AuraFlowControlNetModel":
        config = base.config
        if not config.num_mmdit_layers:
            raise ValueError("a base without blocks of two streams has none to copy")
        blocks = config.num_mmdit_layers + config.num_single_dit_layers
        layers = copied_blocks(blocks, min(COPIED, config.num_mmdit_layers))
        same = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size")
        network = cls(num_layers=layers, **{name: config[name] for name in same})
        network.joint_transformer_blocks.load_state_dict(base.joint_transformer_blocks[:layers].state_dict())
        return network

    @property
    def unused(self) -> tuple[str, ...]:
        last = len(self.joint_transformer_blocks) - 1
        return tuple(f"joint_transformer_blocks.{last}.{name}" for name in TEXT_STREAM)

    def steered_blocks(self, base: Any) -> list[nn.Module]:
        return [*base.joint_transformer_blocks, *base.single_transformer_blocks]

    def told(self, base: Any, asked: Call, first: Call, output: Any, condition: Tensor) -> Call:
        shared = {name: first[name] for name in ("hidden_states", "encoder_hidden_states", "temb")}
        return {"controlnet_cond": condition, **shared}

    def joined(self, output: Any, addition: Tensor) -> Any:
        if isinstance(output, tuple):
            text, tokens = output
            return text, tokens + addition
        return output + F.pad(addition, (0, 0, output.shape[1] - addition.shape[1], 0))  # text comes first

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, controlnet_cond: Tensor
    ) -> list[Tensor]:
        """[B, tokens, width] of each copy, of the base's [B, tokens, width], [B, text tokens, width] and [B, width].

        `controlnet_cond` [B, C, H, W].
        """
        condition = packed(controlnet_cond, self.config.patch_size).to(hidden_states.dtype)
        states, text, outputs = hidden_states + self.controlnet_x_embedder(condition), encoder_hidden_states, []
        for block, after in zip(self.joint_transformer_blocks, self.controlnet_blocks, strict=True):
            text, states = self.called(block, states, text, temb)
            outputs.append(after(states))
        return outputs
