"""The training set of a run, encoded: what a micro-batch is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atelier_api.progress import FunnelReport
from atelier_runtime.data.cache import FRAMES, Cache
from atelier_runtime.data.captions import chosen, is_dropped
from atelier_runtime.data.order import SampleOrder, SliderOrder, Slot
from atelier_runtime.family import Features


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank trains on.

    `latents` [B, C, H, W], [B, C, F, H, W] or, of sounds, [B, C, T] (the posterior's mean where `std` is given), `text` per sample at
    true length, `sizes` [B, 6] in pixels (resized height and width, crop top and left, target height and width), `weights` [B] 0 or 1,
    `slots` places in the global batch, `names` file names, `frames` [B, ...] what is known of the frames that the network is shown,
    `references` clean latents [B, C, H, W] of the reference pictures, `lengths` [B] how many latents of a sound are its own: behind
    them are zeros. Where captions are encoded in the step `text` is empty and `captions` has them. `condition` is what a control
    network is given: `pixels` [B, 3, H, W] from 0 to 255, or latents, `mean` and `std`. `contrast` is the text of the empty caption
    beside each sample's own; empty where the objective contrasts with none.
    """

    latents: Tensor
    std: Tensor | None
    text: list[Features]
    sizes: Tensor
    weights: Tensor
    slots: tuple[int, ...]
    names: tuple[str, ...]
    frames: Features | None = None
    references: tuple[Tensor, ...] = ()
    lengths: Tensor | None = None
    condition: Features | None = None
    captions: tuple[str, ...] = ()
    contrast: list[Features] = field(default_factory=list)

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory, from which copies to a GPU do not block."""
        return replace(
            self,
            latents=self.latents.pin_memory(),
            std=None if self.std is None else self.std.pin_memory(),
            text=[{name: tensor.pin_memory() for name, tensor in features.items()} for features in self.text],
            sizes=self.sizes.pin_memory(),
            weights=self.weights.pin_memory(),
            frames=self.frames and {name: tensor.pin_memory() for name, tensor in self.frames.items()},
            references=tuple(tensor.pin_memory() for tensor in self.references),
            lengths=None if self.lengths is None else self.lengths.pin_memory(),
            condition=self.condition and {name: tensor.pin_memory() for name, tensor in self.condition.items()},
            contrast=self.contrast and [{name: t.pin_memory() for name, t in each.items()} for each in self.contrast],
        )


@dataclass(frozen=True)
class Columns:
    """The kept samples, one row each. Captions of sample i are the cache rows `captions[first[i]:first[i + 1]]`, or their places in
    `texts` where they are encoded in the step.

    `empty` [N] is the row of the empty caption. `references` [N, n] are rows of the reference pictures, -1 behind a sample's last.
    `conditions` [N] are rows of the conditioning pictures, -1 where there is none.
    `padded` [N] is how many latents a sound's bucket has; 0 where latents are not padded.
    """

    names: Sequence[str]
    latents: NDArray[np.int64]
    sizes: NDArray[np.int32]
    captions: NDArray[np.int64]
    first: NDArray[np.int64]
    empty: NDArray[np.int64]
    references: NDArray[np.int64]
    conditions: NDArray[np.int64]
    padded: NDArray[np.int32]
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class CaptionDraws:
    """What chance decides about captions, and whether a sample comes with the empty one as well."""

    dropout: float
    seed: int
    contrast: bool = False


class Dataset:
    """Encoded samples, their order, and the funnel they came through."""

    def __init__(
        self,
        columns: Columns,
        cache: Cache,
        order: SampleOrder | SliderOrder,
        draws: CaptionDraws,
        *,
        funnel: FunnelReport,
        fingerprint: str,
        frame_rate: float | None,
        shared: Features,
        device: torch.device,
    ) -> None:
        self.order = order
        self.funnel = funnel
        self.hash = fingerprint
        """Digest of all samples and captions: equal for equal training sets."""
        self.frame_rate = frame_rate
        """Frames per second of clips; None for others."""
        self.shared = shared
        """What all samples are told."""
        self.device = device
        self._columns = columns
        self._cache = cache
        self._draws = draws

    def __len__(self) -> int:
        return len(self._columns.names)

    def load(self, slots: Sequence[Slot], *, step: int, epoch: int) -> MicroBatch:
        """The micro-batch of these slots of a step, all of one bucket. Caption dropout is applied."""
        columns = self._columns
        entries = [self._cache.read(int(columns.latents[slot.sample])) for slot in slots]
        padded = int(columns.padded[slots[0].sample])
        lengths = torch.tensor([entry["mean"].shape[-1] for entry in entries]) if padded else None
        stds = [_padded(entry["std"], padded) for entry in entries if "std" in entry]
        texts = columns.texts and [columns.texts[self._caption_row(slot, step, epoch)] for slot in slots]
        frames = [name for name in entries[0] if name.startswith(FRAMES)]
        return MicroBatch(
            latents=torch.stack([_padded(entry["mean"], padded) for entry in entries]),
            std=torch.stack(stds) if stds else None,
            text=[] if texts else [self._cache.read(self._caption_row(slot, step, epoch)) for slot in slots],
            sizes=torch.from_numpy(columns.sizes[[slot.sample for slot in slots]]).to(torch.float32),
            weights=torch.tensor([slot.weight for slot in slots], dtype=torch.float32),
            slots=tuple(slot.index for slot in slots),
            names=tuple(columns.names[slot.sample] for slot in slots),
            frames={name.removeprefix(FRAMES): torch.stack([entry[name] for entry in entries]) for name in frames}
            or None,
            references=self._references(slots),
            lengths=lengths,
            # Of a run either all samples have one or none.
            condition=None if columns.conditions[slots[0].sample] < 0 else self._condition(slots),
            captions=tuple(texts),
            contrast=[self._cache.read(int(columns.empty[slot.sample])) for slot in slots]
            if self._draws.contrast
            else [],
        )

    def _references(self, slots: Sequence[Slot]) -> tuple[Tensor, ...]:
        """Samples of one bucket have the same number of references, of the same sizes."""
        rows = self._columns.references[[slot.sample for slot in slots]]
        rows = rows[:, rows[0] >= 0]
        return tuple(torch.stack([self._cache.read(int(row))["mean"] for row in column]) for column in rows.T)

    def _condition(self, slots: Sequence[Slot]) -> Features:
        entries = [self._cache.read(int(self._columns.conditions[slot.sample])) for slot in slots]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    def _caption_row(self, slot: Slot, step: int, epoch: int) -> int:
        """Cache row of the caption that the slot trains on."""
        columns, draws = self._columns, self._draws
        if is_dropped(draws.dropout, draws.seed, step, slot.index):
            return int(columns.empty[slot.sample])
        first, end = int(columns.first[slot.sample]), int(columns.first[slot.sample + 1])
        return int(columns.captions[first + chosen(end - first, draws.seed, epoch, slot.sample)])


def _padded(latents: Tensor, length: int) -> Tensor:
    """Latents [C, T] with zeros behind them, [C, length]; others, of `length` 0, as they are."""
    return torch.nn.functional.pad(latents, (0, length - latents.shape[-1])) if length else latents
