"""Stable Diffusion XL: a UNet that predicts epsilon (or v, by the checkpoint's scheduler) at DDPM steps (arXiv:2307.01952).

Latents [B, 4, H/8, W/8]. Text: the penultimate layers of two CLIP encoders side by side, 77 tokens, and the second one's pooled
vector; sizes and crop of the picture are conditions as well. Source: diffusers' `pipeline_stable_diffusion_xl.py`; all else is in
`atelier_runtime.family_parts.text_time_unet`.
"""

from collections.abc import Sequence
from typing import Any

from atelier_runtime.family import Features
from atelier_runtime.family_parts.text_time_unet import TextTimeUNet
from atelier_runtime.family_parts.unet import LORA_RULES, UNetControl
from atelier_runtime.lora_layout import LoraLayout


class TextTimeControl(UNetControl):
    pipeline = "StableDiffusionXLControlNetPipeline"


class StableDiffusionXL(TextTimeUNet):
    name = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    lora_layout = LoraLayout(architecture="stable-diffusion-xl-v1-base", flat=True, rules=LORA_RULES)
    control = TextTimeControl()

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [77, 2048] and `pooled` [1280].

        The empty caption is what the pipeline takes for "no prompt", and that is zeros in the published checkpoints
        (`force_zeros_for_empty_prompt`), not the encoding of "".
        """
        embeds, null_embeds, pooled, null_pooled = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=True)
        return [
            {"embeds": embeds[i], "pooled": pooled[i]}
            if prompt
            else {"embeds": null_embeds[i], "pooled": null_pooled[i]}
            for i, prompt in enumerate(prompts)
        ]


FAMILY = StableDiffusionXL()
