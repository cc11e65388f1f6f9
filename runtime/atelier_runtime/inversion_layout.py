"""Where the vectors of placeholders are: in the parameters that train, and in the files that others load.

A file holds one placeholder: a tensor [vectors, width] for each text encoder, named as the family's `vocabularies` say. ComfyUI and
the web UIs read the same names (`clip_l`, `clip_g`), and call the placeholder by the file's name.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from atelier_api.v1alpha1.adapter import InvertedToken, TextualInversionAdapter

CHILD = "textual_inversion"
"""Name below the denoiser of what is trained: [all vectors, width] for each text encoder, by its key."""


def rows_of(adapter: TextualInversionAdapter, rows: Tensor) -> Iterator[tuple[InvertedToken, Tensor]]:
    """The placeholders with their vectors [vectors, width]."""
    yield from zip(adapter.tokens, torch.split(rows, [each.vectors for each in adapter.tokens]), strict=True)


def files(weights: Mapping[str, Tensor], adapter: TextualInversionAdapter) -> dict[str, dict[str, Tensor]]:
    """Tensors of each placeholder's file, from parameters by their names in the denoiser (`textual_inversion.<key>`)."""
    tensors: dict[str, dict[str, Tensor]] = {each.token: {} for each in adapter.tokens}
    for name, rows in weights.items():
        for token, vectors in rows_of(adapter, rows):
            tensors[token.token][name.removeprefix(f"{CHILD}.")] = vectors.contiguous()
    return tensors
