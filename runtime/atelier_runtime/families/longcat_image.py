"""LongCat-Image: a flow transformer, first with two streams and then with one (arXiv:2512.07584).

Text: Qwen2.5-VL with an instruction around exactly 512 tokens of caption and padding, which are kept without a mask; what stands in
quotes is tokenised letter by letter. Source: diffusers' `pipeline_longcat_image.py`; all else is in
`atelier_runtime.family_parts.longcat_image`.
"""

from collections.abc import Sequence
from typing import Any

from atelier_runtime.family import Features, SampleRequest
from atelier_runtime.family_parts.longcat_image import LongCatImageNetwork


class LongCatImage(LongCatImageNetwork):
    """LongCat-Image and its mid-training checkpoint, text to image."""

    name = "longcat_image"
    pipeline = "LongCatImagePipeline"
    # It rewrites prompts, which is off below. Its class is made with torchvision alone.
    left_out = ("text_processor",)

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [512, 3584], those of the padding included."""
        embeds, _ = pipe.encode_prompt(list(prompts))
        return [{"embeds": one} for one in embeds]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """The prompt as it is written: the pipeline would have its encoder write another one first."""
        return super().sampling_arguments(pipe, request) | {"enable_prompt_rewrite": False}


FAMILY = LongCatImage()
