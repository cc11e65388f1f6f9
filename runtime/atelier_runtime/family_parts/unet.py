"""What families around a `UNet2DConditionModel` share.

Latents [B, 4, H/8, W/8]. The network predicts epsilon or v, by the checkpoint's scheduler, at the integer steps of its noise schedule.
Source: diffusers' `unet_2d_condition.py`.
"""

from typing import Any

from torch import Tensor, nn

from atelier_runtime.control import Control
from atelier_runtime.family import Blocks, Conditions, Family
from atelier_runtime.lora_layout import Rule

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ff.net.0.proj", "ff.net.2")

LORA_RULES = (
    Rule(
        r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\."
        r"(?:proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))",
        r"\g<0>",
    ),
)
"""ComfyUI and kohya's scripts name its layers as diffusers does. The stock pipelines' `load_lora_weights` reads such files."""


class UNet(Family):
    """A family whose denoiser is such a UNet; its text features are `embeds` [L, D]."""

    denoisers = ("unet",)
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP, "proj_in", "proj_out")}  # noqa: RUF012
    blocks = tuple(
        Blocks(attribute, "maps", inner="BasicTransformerBlock")
        for attribute in ("down_blocks", "mid_block.attentions", "up_blocks")
    )
    unquantized = (r".*\.time_emb_proj",)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Epsilon or v, [B, 4, H/8, W/8]."""
        return denoiser(
            noisy,
            time,
            encoder_hidden_states=conditions.text["embeds"],
            added_cond_kwargs=self.added_conditions(conditions),
            return_dict=False,
            **conditions.controlled,
        )[0]

    def added_conditions(self, conditions: Conditions) -> dict[str, Tensor]:
        """What the network is told beside the tokens of the text."""
        return {}


class UNetControl(Control):
    """The half of the UNet that leads down and its middle, which are added to what the base hands to the half that leads up.

    Source: diffusers' `controlnet.py`, `pipeline_controlnet.py` and `pipeline_controlnet_sd_xl.py`.
    """

    network = "ControlNetModel"
    picture = "image"
    takes = "pixels"

    def copied(self, base: nn.Module) -> nn.Module:
        from diffusers import ControlNetModel

        return ControlNetModel.from_unet(base)

    def predict(
        self, base: nn.Module, network: nn.Module, condition: Tensor, scale: float, *given: Any, **named: Any
    ) -> Any:
        down, middle = network(*given, controlnet_cond=condition, conditioning_scale=scale, **named)
        return base(*given, down_block_additional_residuals=down, mid_block_additional_residual=middle, **named)
