"""Qwen2-VL's and Qwen2.5-VL's processor of captions and pictures, without torchvision.

transformers makes the processor of a checkpoint from three: of pictures, of clips, and the tokenizer. That of clips needs torchvision,
which text encoding does not. Here it is left out, and pictures are read with Pillow. All formulas are transformers' own, in
`processing_qwen2_vl.py` and `image_processing_pil_qwen2_vl.py`: a picture is resized to multiples of 28 pixels between the
checkpoint's limits, cut into patches of 14 pixels, and each 2 x 2 patches take one `<|image_pad|>` of the text.
"""

from pathlib import Path
from typing import Any, Self

from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin


class PictureReader(Qwen2VLProcessor):
    """`image_processor`, `tokenizer` and the call of captions with pictures, as the stock pipelines use them."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The processor that a checkpoint has in `folder`. Raises OSError where there is none."""
        parts = (
            each.from_pretrained(folder, local_files_only=True) for each in (Qwen2VLImageProcessorPil, Qwen2Tokenizer)
        )
        return cls(*parts)
