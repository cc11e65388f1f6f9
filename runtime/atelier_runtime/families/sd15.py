"""Stable Diffusion 1.5 and 2.1: a UNet that predicts epsilon, or v where the checkpoint's scheduler says so, as that of 2.1 does
(arXiv:2112.10752, arXiv:2202.00512).

Latents [B, 4, H/8, W/8]. Text: the last layer of one CLIP encoder, normalised, 77 tokens; the encoder of 2.1 comes without the layer
that was its last. There is no vector for the whole text, and sizes are no condition. Source: diffusers'
`pipeline_stable_diffusion.py`; all else is in `atelier_runtime.family_parts.unet`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from atelier_runtime.family import Features
from atelier_runtime.family_parts.unet import LORA_RULES, UNet, UNetControl
from atelier_runtime.lora_layout import LoraLayout

WIDTH_1 = 768
"""Of the text that the UNet of 1.x is told of; a LoRA for it fits no 2.x."""


class TextControl(UNetControl):
    pipeline = "StableDiffusionControlNetPipeline"


class StableDiffusion15(UNet):
    name = "sd15"
    pipeline = "StableDiffusionPipeline"
    # They blacken pictures that they take for nudity: samples would hide what was learnt.
    left_out = ("safety_checker", "feature_extractor")
    lora_layout = LoraLayout(architecture="stable-diffusion-v1", flat=True, rules=LORA_RULES)
    control = TextControl()

    def architecture(self, denoiser_config: Mapping[str, Any]) -> str:
        """2.x has two: pictures of 512 pixels and epsilon, or of 768 and v."""
        if denoiser_config["cross_attention_dim"] == WIDTH_1:
            return super().architecture(denoiser_config)
        return f"stable-diffusion-v2-{'768-v' if denoiser_config['sample_size'] == 96 else '512'}"

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [77, 768], of 2.1 [77, 1024]."""
        embeds, _ = pipe.encode_prompt(
            list(prompts), pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return [{"embeds": one} for one in embeds]


FAMILY = StableDiffusion15()
