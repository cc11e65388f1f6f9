"""What families around a `UNet2DConditionModel` share that is told of a pooled text and of sizes (`addition_embed_type="text_time"`).

Latents [B, 4, H/8, W/8]. The network predicts epsilon or v, by the checkpoint's scheduler, at the integer steps of its noise schedule.
Beside the tokens of the text it is given one vector for the whole text, and the picture's original size, crop and size. Source:
diffusers' `unet_2d_condition.py` and `pipeline_stable_diffusion_xl.py`.
"""

from typing import Any

from torch import Tensor, nn

from atelier_runtime.control import Control
from atelier_runtime.family import Blocks, Conditions, Family

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
MLP = ("ff.net.0.proj", "ff.net.2")


class TextTimeUNet(Family):
    """A family whose denoiser is such a UNet; its text features are `embeds` [L, D] and `pooled` [P]."""

    denoisers = ("unet",)
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP, "proj_in", "proj_out")}  # noqa: RUF012
    blocks = (Blocks("down_blocks", "maps"), Blocks("mid_block.attentions", "maps"), Blocks("up_blocks", "maps"))

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Epsilon or v, [B, 4, H/8, W/8]."""
        return denoiser(
            noisy,
            time,
            encoder_hidden_states=conditions.text["embeds"],
            added_cond_kwargs={"text_embeds": conditions.text["pooled"], "time_ids": conditions.sizes},
            return_dict=False,
            **conditions.controlled,
        )[0]


class UNetControl(Control):
    """The half of the UNet that leads down and its middle, which are added to what the base hands to the half that leads up.

    Source: diffusers' `controlnet.py` and `pipeline_controlnet_sd_xl.py`.
    """

    pipeline = "StableDiffusionXLControlNetPipeline"
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
