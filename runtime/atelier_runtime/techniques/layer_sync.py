"""LayerSync (arXiv:2510.12581): an earlier block learns from a later one of the same network.

The loss is minus the weight times the mean cosine between what the two blocks return for each token of what is drawn; the later block
gets no gradient by it. Tokens that the objective's loss is not on (text, references, frames that are shown, what fills a bucket of
sounds) do not take part.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_api.errors import ConfigError
from atelier_api.technique_rules import block_number
from atelier_api.v1alpha1.techniques import LayerSync as LayerSyncSpec
from atelier_runtime.family import Family, latent_tokens
from atelier_runtime.techniques.picture_blocks import PictureBlock, counted_tokens, picture_blocks, picture_tokens
from atelier_runtime.techniques.technique import Pass, Technique


def alignment(student: Tensor, teacher: Tensor, counted: Tensor | None) -> Tensor:
    """[B] in [-1, 1]: mean over the tokens of [B, N, D] of the cosine between both, with a gradient to the student alone.

    `counted` [B, N] is 1 for the tokens that the mean is over and 0 for others; None: all.
    """
    cosine = functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    if counted is None:
        return cosine.mean(dim=1)
    return (cosine * counted).sum(dim=1) / counted.sum(dim=1)


class LayerSync(Technique):
    """Hooks on the two blocks of every denoiser, which keep what they return while a pass is watched."""

    name = "layerSync"

    def __init__(self, spec: LayerSyncSpec, family: Family, denoisers: Mapping[str, nn.Module]) -> None:
        """Raises ConfigError for a block that a denoiser does not have."""
        self._spec = spec
        self._family = family
        self._watched = False
        self._outputs: tuple[list[Any], list[Any]] = ([], [])
        self._blocks: list[PictureBlock] = []
        for denoiser in denoisers.values():  # of experts, which are alike, each is called in steps of its own
            self._blocks = picture_blocks(denoiser, family)
            for problem in block_number(spec.teacher_block, len(self._blocks), "the checkpoint in spec.model.source"):
                raise ConfigError(problem.message)
            for role, block in enumerate(self._pair):
                block.module.register_forward_hook(partial(self._keep, role))

    @property
    def _pair(self) -> tuple[PictureBlock, PictureBlock]:
        return self._blocks[self._spec.student_block], self._blocks[self._spec.teacher_block]

    def _keep(self, role: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
        if self._watched:
            self._outputs[role].append(output)

    @contextmanager
    def watching(self) -> Iterator[None]:
        for kept in self._outputs:
            kept.clear()
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def loss(self, seen: Pass) -> Tensor:
        """[B] in [-weight, weight]. Raises ConfigError for blocks that cannot be compared, and where no trained weight would learn."""
        counted = counted_tokens(seen.mask, seen.latents, self._family.facts.patch)
        found: list[Tensor] = []
        first = 0
        for outputs in zip(*self._outputs, strict=True):
            student, teacher = (
                self._tokens(block, output, seen, first) for block, output in zip(self._pair, outputs, strict=True)
            )
            self._check(student, teacher)
            rows = slice(first, first + len(student))
            found.append(alignment(student, teacher, None if counted is None else counted[rows]))
            first = rows.stop
        for kept in self._outputs:  # the graph keeps what the backward pass needs
            kept.clear()
        return -self._spec.weight * torch.cat(found)

    def _tokens(self, block: PictureBlock, output: Any, seen: Pass, first: int) -> Tensor:
        """The tokens of what is drawn in what one call of the block returned, for samples from number `first` on."""
        lengths = None
        if block.streams == "text|tokens|padding":
            lengths = seen.conditions.text["mask"].sum(dim=1)[first : first + len(output)]
        return picture_tokens(output, block.streams, latent_tokens(self._family, seen.latents), lengths)

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        spec = self._spec
        if student.shape != teacher.shape:
            sizes = [
                f"block {number} ({block.name}) {tokens.shape[1]} tokens of {tokens.shape[2]} numbers"
                for number, block, tokens in zip(
                    (spec.student_block, spec.teacher_block), self._pair, (student, teacher), strict=True
                )
            ]
            raise ConfigError(
                f"spec.techniques.layerSync compares blocks {spec.student_block} and {spec.teacher_block}, and of the checkpoint in "
                f"spec.model.source {' and '.join(sizes)}; both must be of one size: take two of {self._stages()}"
            )
        if torch.is_grad_enabled() and not student.requires_grad:
            raise ConfigError(
                f"spec.techniques.layerSync.studentBlock is {spec.student_block} ({self._pair[0].name}), and no trained weight is in "
                "it or before it, so nothing would learn; take a later block, or more of spec.adapter.targets"
            )

    def _stages(self) -> str:
        """`0–3 (down_blocks.1), 4–23 (down_blocks.2)`."""
        parts = []
        for stage, members in groupby(enumerate(self._blocks), key=lambda numbered: numbered[1].stage):
            numbers = [number for number, _ in members]
            parts.append(f"{numbers[0]}–{numbers[-1]} ({stage})")
        return ", ".join(parts)
