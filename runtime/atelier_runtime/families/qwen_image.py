"""Qwen-Image: a flow transformer of two streams, with true classifier-free guidance (arXiv:2508.02324).

Text: Qwen2.5-VL after a template whose first 34 tokens are dropped, at most 512 tokens, of which a mask hides the padding. Source:
diffusers' `pipeline_qwenimage.py`; all else is in `atelier_runtime.family_parts.qwen_image`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from atelier_runtime.family import Features, SampleRequest
from atelier_runtime.family_parts.qwen_image import QwenImageNetwork

TEXT_TOKENS = 512  # what the pipeline keeps when it samples; `encode_prompt` alone would keep 1024


class QwenImage(QwenImageNetwork):
    name = "qwen_image"
    pipeline = "QwenImagePipeline"

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`embeds` [L, 3584] and `mask` [L], all true: after padding in a batch the mask tells the true length."""
        embeds, mask = pipe.encode_prompt(list(prompts), max_sequence_length=TEXT_TOKENS)
        if mask is None:  # all of the same length
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return [{"embeds": row[kept], "mask": kept[kept]} for row, kept in zip(embeds, mask.bool(), strict=True)]

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        return super().sampling_arguments(pipe, request) | {"max_sequence_length": TEXT_TOKENS}


FAMILY = QwenImage()
