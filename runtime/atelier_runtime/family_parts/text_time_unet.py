"""What families around a UNet share that is told of a pooled text and of sizes (`addition_embed_type="text_time"`).

Beside the tokens of the text it is given one vector for the whole text, and the picture's original size, crop and size. Source:
diffusers' `unet_2d_condition.py` and `pipeline_stable_diffusion_xl.py`; all else is in `atelier_runtime.family_parts.unet`.
"""

from typing import Any

from torch import Tensor, nn

from atelier_runtime.control import Control
from atelier_runtime.family import Conditions
from atelier_runtime.family_parts.unet import UNet


class TextTimeUNet(UNet):
    """A family whose denoiser is such a UNet; its text features are `embeds` [L, D] and `pooled` [P]."""

    def added_conditions(self, conditions: Conditions) -> dict[str, Tensor]:
        return {"text_embeds": conditions.text["pooled"], "time_ids": conditions.sizes}


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
