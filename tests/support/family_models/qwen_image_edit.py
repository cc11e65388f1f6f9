"""Qwen-Image-Edit: the parts of Qwen-Image in pipelines of its own, with an encoder that is shown pictures."""

import re
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageTransformer2DModel

from family_models import qwen_image
from family_models.kinds import Published
from family_models.parts import picture_reader, scale_references_down


def tiny(pipeline: Any, **network: Any) -> Any:
    parts = qwen_image.tiny(**network).components
    pipe = pipeline(**parts, processor=picture_reader(parts["text_encoder"], parts["tokenizer"]))
    # With the spaces before them, or the template would be twice as long, of which the pipeline drops 64 tokens.
    pipe.tokenizer.add_tokens(sorted(set(re.findall(" [A-Za-z]+", pipe.prompt_template_encode))))
    scale_references_down(sys.modules[pipeline.__module__])
    return pipe


_LIKE = qwen_image.TINY["qwen_image"]
TINY = {
    "qwen_image_edit": replace(_LIKE, make=partial(tiny, QwenImageEditPipeline)),
    "qwen_image_edit_2511": replace(
        _LIKE, make=partial(tiny, QwenImageEditPlusPipeline, zero_cond_t=True), references=2
    ),
}

PUBLISHED = Published(
    denoisers={
        "2511": (QwenImageTransformer2DModel, {"zero_cond_t": True}),
        "2509": (QwenImageTransformer2DModel, {}),
        "v1": (QwenImageTransformer2DModel, {}),
    },
    encoders=qwen_image.PUBLISHED.encoders,
    autoencoder=qwen_image.PUBLISHED.autoencoder,
)
