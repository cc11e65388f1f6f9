"""OmniGen, text to image: flow matching in a language model that reads the caption itself.

One sequence of caption, a token of the time, and the picture's patches. Caption and time see what is before them, the picture sees
everything. There is no text encoder: the features are token ids. Time is 1 - sigma, 0 is noise, and the network predicts
clean - noise; both are hidden here. Latents [B, 4, H/8, W/8] of SDXL's autoencoder. Source: diffusers' `pipeline_omnigen.py`,
`processor_omnigen.py` and `transformer_omnigen.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_runtime.family import Blocks, Conditions, Family, Features, SampleRequest, TimeEmbedder, configuration

PADDING = 2  # the id that the pipeline pads with
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("mlp.gate_up_proj", "mlp.down_proj")


class OmniGen(Family):
    """OmniGen v1 without pictures among its input."""

    name = "omnigen"
    pipeline = "OmniGenPipeline"
    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("layers", "text|tokens"),)
    time_embedder = TimeEmbedder("time_token", "time_proj", reversed=True)
    frozen_parameters = (r"patch_embedding\.input_image_proj\..*",)  # for pictures among the input

    def provided_components(self, folder: Path) -> dict[str, Any]:
        """None, but the pipeline can be built after this call without torchvision, which it would use on pictures alone."""
        from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

        if not hasattr(processor_omnigen, "transforms"):
            names = ("Compose", "Lambda", "ToTensor", "Normalize")
            processor_omnigen.transforms = SimpleNamespace(**dict.fromkeys(names, _no_pictures))
            pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
        return {}

    def encode_text(self, pipe: Any, prompts: Sequence[str]) -> list[Features]:
        """`ids` [L] of the caption in the pipeline's template, at whatever length."""
        read = pipe.multimodal_processor.process_multi_modal_prompt
        return [{"ids": torch.tensor(read(prompt, None)["input_ids"])} for prompt in prompts]

    def collate_text(self, samples: Sequence[Features]) -> Features:
        """`ids` and `mask` [B, L], padded on the left: the picture follows the last token of each caption."""
        rows = [sample["ids"] for sample in samples]
        missing = [max(map(len, rows)) - len(row) for row in rows]
        pairs = list(zip(rows, missing, strict=True))
        return {
            "ids": torch.stack([functional.pad(row, (count, 0), value=PADDING) for row, count in pairs]),
            "mask": torch.stack([functional.pad(torch.ones_like(row), (count, 0)).bool() for row, count in pairs]),
        }

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean, [B, 4, H, W].

        Positions are counted from the first column, padding included. The network takes those of the first sample for all, so
        counting from each caption's start would put the others wrong; attention knows only their differences, which are the same.
        """
        height, width = noisy.shape[-2:]
        visible = attention_mask(conditions.text["mask"], height * width // configuration(denoiser).patch_size ** 2)
        output = denoiser(
            hidden_states=noisy,
            timestep=1 - time,
            input_ids=conditions.text["ids"],
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=visible.to(noisy.dtype),
            position_ids=torch.arange(visible.shape[-1], device=noisy.device).unsqueeze(0),
            return_dict=False,
        )[0]
        return -output

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """A negative prompt goes to `pipe`'s processor, which has one of its own: the pipeline's call takes none."""
        stock = getattr(pipe.multimodal_processor, "stock", pipe.multimodal_processor)
        pipe.multimodal_processor = stock if request.negative is None else Contrasting(stock, request.negative)
        return super().sampling_arguments(pipe, replace(request, negative=None))


class Contrasting:
    """The pipeline's processor of prompts with another negative prompt."""

    def __init__(self, stock: Any, negative: str) -> None:
        self.stock = stock
        self.negative = negative

    def __call__(self, *prompts: Any, **options: Any) -> Any:
        return self.stock(*prompts, negative_prompt=self.negative, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


def attention_mask(text: Tensor, picture_tokens: int) -> Tensor:
    """[B, S, S], true where a row's token sees a column's: S is caption, time and picture. `text`: [B, L], true tokens of captions.

    Padding sees everything, as in the pipeline, since a row that sees nothing would be no number; nothing sees it.
    """
    real = functional.pad(text, (0, 1 + picture_tokens), value=True)
    place = torch.arange(real.shape[1], device=text.device)
    allowed = (place[None, :] <= place[:, None]) | (place[:, None] > text.shape[1])
    return (allowed & real[:, None, :]) | ~real[:, :, None]


def _no_pictures(*_: Any, **__: Any) -> None:
    """What the processor's preparation of pictures is made of here: nothing that could be called."""


FAMILY = OmniGen()
