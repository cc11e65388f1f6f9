"""PixArt's ControlNet-Transformer (arXiv:2401.05252, section 4), with the module names of diffusers' research project.

Copies of the base's first 13 blocks, one behind the other. The first is given what the base's first block gives, and the conditioning
picture's latents, embedded by the base and through a layer of zeros; what comes out of copy i goes through a layer of zeros of its own
and is added behind the base's block i. Facts: `examples/research_projects/pixart/controlnet_pixart_alpha.py` of huggingface/diffusers,
and PixArt-alpha/PixArt-alpha.
"""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from atelier_runtime.networks.steering import Call, SteeringModel, zero_linear

COPIED = 13
TOLD = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep")
"""What all blocks are told alike, in the order of their arguments."""


class PixArtControlNetAdapterModel(SteeringModel):
    """Arguments are those of the base's config; the published folders have `num_layers` alone, and PixArt's sizes."""

    @register_to_config
    def __init__(
        self,
        num_layers: int = COPIED,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        dropout: float = 0.0,
        cross_attention_dim: int = 1152,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        attention_bias: bool = True,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        attention_type: str = "default",
    ) -> None:
        super().__init__()
        block = {name: value for name, value in self.config.items() if name in _OF_BLOCK}
        width = num_attention_heads * attention_head_dim
        self.controlnet_blocks = nn.ModuleList(
            PixArtControlNetAdapterBlock(BasicTransformerBlock(width, **block), width, first=number == 0)
            for number in range(num_layers)
        )
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(cls, base: Any) -> "PixArtControlNetAdapterModel":
        """Of all blocks but the last, behind which published loaders add nothing, as many as were published."""
        layers = min(COPIED, base.config.num_layers - 1)
        if not layers:
            raise ValueError(f"a base of {base.config.num_layers} blocks has none to copy")
        network = cls(num_layers=layers, **{name: base.config[name] for name in _OF_BLOCK})
        for copied, block in zip(network.controlnet_blocks, base.transformer_blocks, strict=False):
            copied.transformer_block.load_state_dict(block.state_dict())
        return network

    def steered_blocks(self, base: Any) -> list[nn.Module]:
        return [*base.transformer_blocks[: len(self.controlnet_blocks)]]

    def told(self, base: Any, asked: Call, first: Call, output: Any, condition: Tensor) -> Call:
        shared = {name: first.get(name) for name in TOLD}
        return {"hidden_states": output, "controlnet_states": base.pos_embed(condition), **shared}

    def joined(self, output: Any, addition: Tensor) -> Any:
        return output + addition

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
    ) -> list[Tensor]:
        """What is added behind each block, [B, tokens, width]. All but `controlnet_states`, the condition's tokens, is the base's."""
        told = (attention_mask, encoder_hidden_states, encoder_attention_mask, timestep)
        states, outputs = controlnet_states, []
        for number, block in enumerate(self.controlnet_blocks):
            states, output = self.called(block, states, hidden_states if number == 0 else None, *told)
            outputs.append(output)
        return outputs


class PixArtControlNetAdapterBlock(nn.Module):
    """A copied block between layers of zeros; only the first has one in front."""

    def __init__(self, block: nn.Module, width: int, *, first: bool) -> None:
        super().__init__()
        if first:
            self.before_proj = zero_linear(width, width)
        self.transformer_block = block
        self.after_proj = zero_linear(width, width)

    def forward(self, states: Tensor, base_states: Tensor | None, *told: Any) -> tuple[Tensor, Tensor]:
        """(what goes on, what is added to the base). The first is given `base_states` as well, and the condition's as `states`."""
        if base_states is not None:
            states = base_states + self.before_proj(states)
        states = self.transformer_block(states, *told)
        return states, self.after_proj(states)


_OF_BLOCK = (
    "num_attention_heads",
    "attention_head_dim",
    "dropout",
    "cross_attention_dim",
    "activation_fn",
    "num_embeds_ada_norm",
    "attention_bias",
    "upcast_attention",
    "norm_type",
    "norm_elementwise_affine",
    "norm_eps",
    "attention_type",
)
"""What the base's config has for its blocks."""
