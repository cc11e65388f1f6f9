"""Textual inversion (arXiv:2208.01618): vectors for new tokens of the text encoders are all that is trained.

The stock pipeline's own loader makes the tokens: it adds them to each tokenizer and makes room for their rows in each encoder, so a
caption is read here as it is by whoever loads the result. A placeholder of several vectors is several tokens (`<fox>`, `<fox>_1` …),
which the pipeline puts into captions and prompts by itself. The rows that are trained lie apart, as the denoiser's child
`textual_inversion`, where optimizer, checkpoints and data-parallel reduction find them, and take the place of what the encoder looks
up for the new tokens. All rows of its own vocabulary stay as they are, to the bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from atelier_api.errors import ConfigError
from atelier_api.families import Vocabulary
from atelier_api.v1alpha1.adapter import InvertedToken, TextualInversionAdapter
from atelier_runtime.adapters.report import AdapterReport, report
from atelier_runtime.family import Family, Features
from atelier_runtime.inversion_layout import CHILD, rows_of


def install_tokens(
    denoiser: nn.Module, pipe: Any, adapter: TextualInversionAdapter, family: Family, *, dtype: torch.dtype
) -> AdapterReport:
    """Make the placeholders' rows, in `dtype`, all that trains. `pipe` is the stock pipeline with the family's text encoders, frozen.

    Rows start as copies of the initializer's. The report's `encode` gives the features of captions, [B, ...] on the encoders' device,
    with gradients into the rows. Raises ConfigError where a placeholder is a word already, or an initializer has no token, or more
    than there are vectors.
    """
    denoiser.requires_grad_(False)
    trained = nn.ParameterDict()
    for vocabulary in family.facts.vocabularies:
        tokenizer, encoder = getattr(pipe, vocabulary.tokenizer), getattr(pipe, vocabulary.text_encoder)
        first = len(tokenizer)
        known = encoder.get_input_embeddings().weight
        rows = torch.cat([known[_start_tokens(token, tokenizer)] for token in adapter.tokens]).float()
        _add(pipe, vocabulary, adapter, rows)
        encoder.requires_grad_(False)
        trained[vocabulary.key] = Parameter(rows.to(dtype))
        _look_up(encoder.get_input_embeddings(), trained[vocabulary.key], first)
    denoiser.add_module(CHILD, trained)
    denoiser.train()

    def encode(captions: Sequence[str]) -> Features:
        return family.collate_text(family.encode_text(pipe, captions))

    return report(denoiser, {each.token: each.vectors for each in adapter.tokens}, encode=encode)


def show_tokens(
    pipe: Any, adapter: TextualInversionAdapter, family: Family, denoisers: Mapping[str, nn.Module]
) -> None:
    """Give the stock pipeline the placeholders as they are now, by its own loader."""
    trained = dict(denoisers[family.denoisers[0]].get_submodule(CHILD).named_parameters())
    for vocabulary in family.facts.vocabularies:
        _add(pipe, vocabulary, adapter, trained[vocabulary.key].detach())


def _add(pipe: Any, vocabulary: Vocabulary, adapter: TextualInversionAdapter, rows: Tensor) -> None:
    tokenizer, encoder = getattr(pipe, vocabulary.tokenizer), getattr(pipe, vocabulary.text_encoder)
    with torch.random.fork_rng(devices=[]):  # it draws rows to begin with, which are written over
        for token, vectors in rows_of(adapter, rows):
            pipe.load_textual_inversion(vectors, token=token.token, tokenizer=tokenizer, text_encoder=encoder)


def _start_tokens(token: InvertedToken, tokenizer: Any) -> list[int]:
    """The tokens whose vectors the placeholder's start from, one for each of its own."""
    if token.token in tokenizer.get_vocab():
        raise ConfigError(
            f"spec.adapter.tokens has {token.token}, which is a token of the checkpoint's tokenizer; it must be a new one: change "
            "spec.adapter.tokens[].token"
        )
    start = tokenizer(token.initializer, add_special_tokens=False).input_ids
    if not start or tokenizer.unk_token_id in start:
        raise ConfigError(
            f"spec.adapter.tokens[].initializer of {token.token} is {token.initializer!r}, in which the checkpoint's tokenizer finds "
            "no word, or one that it does not know; it must be words of the captions' language"
        )
    most = tokenizer.model_max_length - 2  # the start and the end take one place each
    if not len(start) <= token.vectors <= most:
        raise ConfigError(
            f"spec.adapter.tokens[].vectors of {token.token} is {token.vectors}; must be {len(start)}–{most}: its initializer "
            f"{token.initializer!r} has {len(start)} token{'' if len(start) == 1 else 's'}, and a caption has room for {most}; change "
            "the one or the other"
        )
    return [start[index % len(start)] for index in range(token.vectors)]


def _look_up(embedding: nn.Embedding, rows: Parameter, first: int) -> None:
    """Have `embedding` give `rows` for the tokens from `first` on."""

    def replaced(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        numbers = inputs[0] - first
        # Rows are looked up for other tokens too, and thrown away: so they always are in the graph, which DDP counts on.
        learnt = F.embedding(numbers.clamp(min=0), rows).to(output.dtype)
        return torch.where((numbers >= 0).unsqueeze(-1), learnt, output)

    embedding.register_forward_hook(replaced)
