"""Qwen-Image-Edit: Qwen-Image that is given pictures beside the instruction what to make of them.

A reference enters twice, always scaled to an area of its own whatever the size of the target: as clean tokens, of a megapixel, and
through Qwen2.5-VL, whose tokens of the picture stay in the text. The first checkpoint takes one reference, and shows its encoder the
same megapixel; those since 2509 take up to three, and show it 384 x 384 pixels of each, as "Picture 1", "Picture 2", …. The first 64
tokens of the template are dropped, the caption is never cut. With transformers 5 the pipelines give the encoder no rows and columns
of the picture's tokens, only their order (diffusers issue 14194): training sees the same embeddings. Source: diffusers'
`pipeline_qwenimage_edit.py` and `pipeline_qwenimage_edit_plus.py`; all else is in `atelier_runtime.family_parts.qwen_image`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from atelier_api.errors import ConfigError
from atelier_runtime.family import Features, SampleRequest, TimeEmbedder
from atelier_runtime.family_parts.qwen_image import QwenImageNetwork

ONE_REFERENCE = "QwenImageEditPipeline"
AREA = 1024 * 1024
"""Pixels of a reference of the first checkpoint, as its text encoder sees it."""
MULTIPLE = 32


class QwenImageEdit(QwenImageNetwork):
    """Qwen-Image-Edit, -2509 and -2511, whose network gives references time 0."""

    name = "qwen_image_edit"
    pipeline = "QwenImageEditPlusPipeline"
    time_embedder = TimeEmbedder("time_text_embed.timestep_embedder", "time_text_embed.time_proj", rows="references")
    text_sees_references = True

    def provided_components(self, folder: Path) -> dict[str, Any]:
        """The checkpoint's processor, whose class in transformers needs torchvision for clips."""
        from atelier_runtime.family_parts.vision_language import PictureReader

        return {"processor": PictureReader.of(folder / "processor")}

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        raise NotImplementedError("qwen_image_edit encodes text beside pictures only")

    def encode_instructions(
        self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]
    ) -> list[Features]:
        """`embeds` [L, 3584], those of the pictures included, and `mask` [L], all true: after padding it tells the true length.

        One sample at a time: the pipelines know one list of pictures for all prompts.
        """
        features = []
        for prompt, pictures in zip(prompts, references, strict=True):
            embeds, _ = pipe.encode_prompt(prompt, image=_shown(pipe, pictures))
            mask = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
            features.append({"embeds": embeds[0], "mask": mask})
        return features

    def reference_size(self, width: int, height: int, resolution: int) -> tuple[int, int]:
        """The pipelines' own, edges to the nearest multiple of 32, of the area of a square of `resolution`."""
        across = math.sqrt(resolution * resolution * (width / height))
        wide, high = (max(round(edge / MULTIPLE), 1) * MULTIPLE for edge in (across, across / (width / height)))
        return wide, high

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Adds the references, in the size of their files: the pipelines scale them as they are scaled in training."""
        arguments = super().sampling_arguments(pipe, request)
        if request.references:
            pictures = _taken(pipe, request.references)
            arguments["image"] = pictures[0] if type(pipe).__name__ == ONE_REFERENCE else pictures
        return arguments


def _taken(pipe: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The references of a sample. Raises ConfigError where the checkpoint's pipeline has no place for them all."""
    if type(pipe).__name__ == ONE_REFERENCE and len(pictures) > 1:
        raise ConfigError(
            f"{len(pictures)} references are given for a sample or a prompt, but the checkpoint of spec.model.source is a "
            f"{ONE_REFERENCE}, which takes one; name one in spec.data.sources and spec.validation.prompts, or train a checkpoint of "
            "2509 or later"
        )
    return list(pictures)


def _shown(pipe: Any, pictures: Sequence[Image.Image]) -> Image.Image | list[Image.Image]:
    """The references as the pipeline shows them to its text encoder."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    taken = _taken(pipe, pictures)
    if type(pipe).__name__ == ONE_REFERENCE:
        width, height, _ = edit.calculate_dimensions(AREA, taken[0].width / taken[0].height)
        return pipe.image_processor.resize(taken[0], height, width)
    sizes = [plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, each.width / each.height) for each in taken]
    return [
        pipe.image_processor.resize(each, height, width) for each, (width, height) in zip(taken, sizes, strict=True)
    ]


FAMILY = QwenImageEdit()
