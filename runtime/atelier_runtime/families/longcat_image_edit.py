"""LongCat-Image-Edit: LongCat-Image that is given a picture beside the instruction what to make of it.

The reference enters twice: as clean tokens, of the time of the noisy ones, and through Qwen2.5-VL at half its edges. Text starts with
the encoder's tokens of the picture, which are as many as its size asks for, and ends with exactly 512 of caption and padding; what
stands in quotes is tokenised letter by letter. The pipeline draws a megapixel in the aspect of the reference, whatever it is asked
for, so target and reference are of one size. With transformers 5 it gives the encoder no rows and columns of the picture's tokens,
only their order (diffusers issue 14194 for Qwen-Image-Edit): training sees the same embeddings. Source: diffusers'
`pipeline_longcat_image_edit.py`; all else is in `atelier_runtime.family_parts.longcat_image`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from atelier_runtime.family import Conditions, Features, SampleRequest
from atelier_runtime.family_parts.longcat_image import LongCatImageNetwork

AREA = 1024 * 1024
"""Pixels of what the pipeline draws, and of the reference."""


class LongCatImageEdit(LongCatImageNetwork):
    name = "longcat_image_edit"
    pipeline = "LongCatImageEditPipeline"
    text_sees_references = True

    def provided_components(self, folder: Path) -> dict[str, Any]:
        """The checkpoint's processor, whose class in transformers needs torchvision for clips."""
        from atelier_runtime.family_parts.vision_language import PictureReader

        return {"text_processor": PictureReader.of(folder / "text_processor")}

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        raise NotImplementedError("longcat_image_edit encodes text beside a picture only")

    def encode_instructions(
        self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Image.Image]]
    ) -> list[Features]:
        """`embeds` [L, 3584], those of the picture and of the padding included, and `mask` [L], all true: it tells the length."""
        features = []
        for prompt, [picture] in zip(prompts, references, strict=True):
            embeds, _ = pipe.encode_prompt(_cut(pipe, prompt), image=_shown(pipe, picture))
            mask = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
            features.append({"embeds": embeds[0], "mask": mask})
        return features

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 16, H, W].

        A call for each sample: references of one size in a small run may have been of others for the encoder, and no mask could hide
        the padding of text. Under sharding all ranks must call equally often, whatever the lengths.
        """
        outputs = []
        for one, length in enumerate(conditions.text["mask"].sum(dim=1).tolist()):
            sample = slice(one, one + 1)
            alone = replace(
                conditions,
                text={"embeds": conditions.text["embeds"][sample, :length]},
                references=tuple(each[sample] for each in conditions.references),
            )
            outputs.append(super().predict(denoiser, noisy[sample], time[sample], alone))
        return torch.cat(outputs)

    def reference_size(self, width: int, height: int, resolution: int) -> tuple[int, int]:
        """The pipeline's own at a resolution of 1024, edges up to the next multiple of 16, and in proportion at others."""
        multiple = self.facts.pixel_multiple
        across = math.sqrt(resolution * resolution * (width / height))
        wide, high = (math.ceil(edge / multiple) * multiple for edge in (across, across / (width / height)))
        return wide, high

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Adds the reference, in the size of its file: the pipeline scales it, and takes no size for what it draws."""
        arguments = super().sampling_arguments(pipe, request)
        del arguments["width"], arguments["height"]
        arguments |= {name: _cut(pipe, arguments[name]) for name in ("prompt", "negative_prompt") if name in arguments}
        if request.references:
            [arguments["image"]] = request.references
        return arguments


def _shown(pipe: Any, picture: Image.Image) -> Image.Image:
    """The reference as the pipeline shows it to its text encoder."""
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as edit

    width, height = edit.calculate_dimensions(AREA, picture.width / picture.height)
    whole = pipe.image_processor.resize(picture, height, width)
    return pipe.image_processor.resize(whole, height // 2, width // 2)


def _cut(pipe: Any, prompt: str) -> str:
    """The beginning of a prompt that has as many tokens as the pipeline keeps: on more it fails, while it words its warning."""
    from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import split_quotation

    def tokens(text: str) -> int:
        pieces = [piece for part, quoted in split_quotation(text) for piece in (part if quoted else [part])]
        return sum(len(pipe.tokenizer(piece, add_special_tokens=False).input_ids) for piece in pieces)

    while (surplus := tokens(prompt) - pipe.tokenizer_max_length) > 0:
        prompt = prompt[: -max(1, surplus // 4)]  # few characters have more than four tokens
    return prompt


FAMILY = LongCatImageEdit()
