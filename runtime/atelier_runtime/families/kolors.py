"""Kolors: Stable Diffusion XL's UNet, told of text by ChatGLM3, a language model of Chinese and English (Kolors Team, 2024).

Epsilon at the steps of the checkpoint's own noise schedule; the published one has 1,100. Text: the layer of ChatGLM before the last,
projected by a layer of the UNet, and the last token of its last layer for the whole text. The padding stands before the text and there
is no mask, so the length is part of the model: 256. Source: diffusers' `pipelines/kolors`; all else is in
`atelier_runtime.family_parts.text_time_unet`.
"""

from collections.abc import Sequence
from typing import Any

from atelier_runtime.family import Features, SampleRequest
from atelier_runtime.family_parts.text_time_unet import TextTimeUNet


class Kolors(TextTimeUNet):
    name = "kolors"
    pipeline = "KolorsPipeline"

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [256, 4096] and `pooled` [4096].

        The pipeline's call leaves the length to `encode_prompt`'s default, whatever its own `max_sequence_length` says.
        """
        embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return [{"embeds": one, "pooled": vector} for one, vector in zip(embeds, pooled, strict=True)]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Always with a negative prompt: without one, `force_zeros_for_empty_prompt` has no pooled zeros and the pipeline fails."""
        return super().sampling_arguments(pipe, request) | {"negative_prompt": request.negative or ""}


FAMILY = Kolors()
