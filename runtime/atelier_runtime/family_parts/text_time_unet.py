"""What families around a UNet share that is told of a pooled text and of sizes (`addition_embed_type="text_time"`).

Beside the tokens of the text it is given one vector for the whole text, and the picture's original size, crop and size. Source:
diffusers' `unet_2d_condition.py` and `pipeline_stable_diffusion_xl.py`; all else is in `atelier_runtime.family_parts.unet`.
"""

from torch import Tensor

from atelier_runtime.family import Conditions
from atelier_runtime.family_parts.unet import UNet


class TextTimeUNet(UNet):
    """A family whose denoiser is such a UNet; its text features are `embeds` [L, D] and `pooled` [P]."""

    def added_conditions(self, conditions: Conditions) -> dict[str, Tensor]:
        return {"text_embeds": conditions.text["pooled"], "time_ids": conditions.sizes}
