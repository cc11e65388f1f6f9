"""Blocks that the tokens of what is drawn go through, be it a picture, a clip or a sound, and these tokens in what a block returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atelier_runtime.family import Family, Streams, named_blocks


@dataclass(frozen=True)
class PictureBlock:
    """One block: its full name, what it returns, and the repeated block of the family that it is or lies in."""

    name: str
    module: nn.Module
    streams: Streams
    stage: str


def picture_blocks(denoiser: nn.Module, family: Family) -> list[PictureBlock]:
    """All of a denoiser, in the order in which the tokens go through them."""
    return list(_found(denoiser, family))


def _found(denoiser: nn.Module, family: Family) -> Iterator[PictureBlock]:
    for part in family.blocks:
        if part.streams == "text":
            continue
        for stage, block in named_blocks(denoiser, part.attribute):
            if not part.inner:
                yield PictureBlock(stage, block, part.streams, stage)
                continue
            for name, module in block.named_modules(prefix=stage):
                # A class of the same name is among the parents of one that is sharded.
                if any(parent.__name__ == part.inner for parent in type(module).__mro__):
                    yield PictureBlock(name, module, part.streams, stage)


def picture_tokens(output: Any, streams: Streams, count: int, text_lengths: Tensor | None) -> Tensor:
    """[B, N, D] of what a block returns: the tokens of what is drawn, without text, padding and references.

    N is `count`, but all there are of a UNet, and fewer of a sound that is shorter. `text_lengths` [B] are asked for where each
    sample's text has a length of its own.
    """
    if streams == "maps":
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first.flatten(2).transpose(1, 2) if first.ndim == 4 else first
    if "," in streams:
        output = output[streams.split(",").index("tokens")]
    if streams == "text|tokens|padding":
        assert text_lengths is not None
        rows = torch.arange(len(output), device=output.device).unsqueeze(1)
        places = text_lengths.unsqueeze(1) + torch.arange(count, device=output.device)
        found: Tensor = output[rows, places]
        return found
    tokens: Tensor = output[:, -count:] if streams == "text|tokens" else output[:, :count]
    return tokens


def counted_tokens(mask: Tensor | None, latents: Tensor, patch: int) -> Tensor | None:
    """[B, N], 1 for tokens on whose latents the loss counts, of the `mask` of latents that have height and width.

    None: on all of them. So it is with sounds, of which each runs alone and at its own length.
    """
    if mask is None or latents.ndim == 3:
        return None
    return mask.expand_as(latents)[:, 0, ..., ::patch, ::patch].flatten(1)
