"""The order of samples: a pure function of the seed and the step, the same for every number of ranks.

An epoch is cut into batches of one bucket each; every sample appears repeats + 1 times. Samples are shuffled inside their
bucket, then the batches of all buckets are shuffled. The last batch of a bucket is filled up with slots of weight 0, so a
batch always has the same number of slots and nothing is dropped, however small a bucket is.

A slider's samples are cut by their sign as well: each sign has epochs of its own, and the signs take turns step by step.
"""

import hashlib
import threading
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

_KEPT_EPOCHS = 2
_KEPT_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the global batch. `index` is its position, `weight` 0 marks a filling that must not count."""

    sample: int
    weight: float
    index: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The global batch of a step. `tokens` are the latent tokens of one of its samples.

    `strength` is what the adapter's update is multiplied by in this step.
    """

    step: int
    epoch: int
    bucket: int
    tokens: int
    slots: tuple[Slot, ...]
    strength: float = 1.0

    @property
    def trains(self) -> bool:
        """Whether the adapter takes part: at strength 0 it has no gradient, and momentum or weight decay would still move weights."""
        return self.strength != 0

    @property
    def total_weight(self) -> float:
        """Sum of the slots' weights: how many samples really count."""
        return sum(slot.weight for slot in self.slots)


class SampleOrder:
    """Which samples a step trains on. Memory: the permutations of at most two epochs."""

    def __init__(
        self,
        buckets: NDArray[np.int32],
        repeats: NDArray[np.int32],
        *,
        tokens: tuple[int, ...],
        global_batch_size: int,
        seed: int,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        """`buckets` [N] and `repeats` [N] per sample; `tokens` per bucket. `numbers` [N] are the samples' own: 0, 1, … by default."""
        if len(buckets) == 0:
            raise ValueError("an order needs at least one sample")
        self._seed = seed
        self._size = global_batch_size
        self._tokens = tokens
        times = repeats.astype(np.int64) + 1
        numbers = np.arange(len(buckets)) if numbers is None else numbers
        by_bucket = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[by_bucket], np.arange(len(tokens)), side="right")
        # Each bucket's samples, every one as often as an epoch shows it.
        self._items = [
            np.repeat(numbers[members], times[members]).astype(np.int32) for members in np.split(by_bucket, ends[:-1])
        ]
        batches = [-(-len(items) // global_batch_size) for items in self._items]
        self._starts = np.concatenate([[0], np.cumsum(batches)])
        self._shuffled: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._batches: dict[int, StepBatch] = {}
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        return int(self._starts[-1])

    @property
    def samples_per_epoch(self) -> int:
        """Samples an epoch shows, repeats counted, fillings not."""
        return sum(len(items) for items in self._items)

    def batch(self, step: int) -> StepBatch:
        """The global batch of a step. Safe to call from several threads."""
        with self._lock:
            if step not in self._batches:
                while len(self._batches) >= _KEPT_BATCHES:
                    del self._batches[next(iter(self._batches))]
                self._batches[step] = self._make(step)
            return self._batches[step]

    def _make(self, step: int) -> StepBatch:
        epoch, position = divmod(step, self.steps_per_epoch)
        number = int(self._permutation(epoch, -1, self.steps_per_epoch)[position])
        bucket = int(np.searchsorted(self._starts, number, side="right")) - 1
        items = self._items[bucket]
        permutation = self._permutation(epoch, bucket, len(items))
        first = (number - int(self._starts[bucket])) * self._size
        slots = tuple(
            Slot(
                sample=int(items[permutation[place % len(items)]]),
                weight=1.0 if place < len(items) else 0.0,
                index=place - first,
            )
            for place in range(first, first + self._size)
        )
        return StepBatch(step, epoch, bucket, self._tokens[bucket], slots)

    def _permutation(self, epoch: int, bucket: int, length: int) -> NDArray[np.int64]:
        """The order of a bucket's items in an epoch; of the epoch's batches for bucket -1."""
        key = (epoch, bucket)
        if key not in self._shuffled:
            for old in [other for other in self._shuffled if abs(other[0] - epoch) >= _KEPT_EPOCHS]:
                del self._shuffled[old]
            self._shuffled[key] = _shuffle((self._seed, epoch, bucket), length)
        return self._shuffled[key]


class SliderOrder:
    """Which samples a step of a slider trains on: positive, negative and neutral ones in turns, of the signs that there are.

    The samples of a sign come in the order that they would have as a training set of their own, so inside an epoch of that sign each
    comes repeats + 1 times. Every sign has as many steps, however many samples it has. A batch has one bucket, and so one strength.
    """

    def __init__(
        self,
        buckets: NDArray[np.int32],
        repeats: NDArray[np.int32],
        *,
        strengths: tuple[float, ...],
        tokens: tuple[int, ...],
        global_batch_size: int,
        seed: int,
    ) -> None:
        """As of a SampleOrder; `strengths` per bucket, since samples of unequal strength are in unequal buckets."""
        self._strengths = strengths
        signs = np.sign(strengths)[buckets]
        members = [np.flatnonzero(signs == sign) for sign in (1, -1, 0)]
        self.parts = tuple(
            SampleOrder(
                buckets[each],
                repeats[each],
                tokens=tokens,
                global_batch_size=global_batch_size,
                seed=seed,
                numbers=each,
            )
            for each in members
            if len(each)
        )
        """The orders of the signs, in their turn."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample has come repeats + 1 times or more often."""
        return len(self.parts) * max(part.steps_per_epoch for part in self.parts)

    def batch(self, step: int) -> StepBatch:
        """The global batch of a step; its epoch is that of its sign. Safe to call from several threads."""
        turn, part = divmod(step, len(self.parts))
        batch = self.parts[part].batch(turn)
        return replace(batch, step=step, strength=self._strengths[batch.bucket])


def _shuffle(key: tuple[int, ...], length: int) -> NDArray[np.int64]:
    """A random permutation. Sorts the generator's raw output: numpy promises that stream for ever, but not `permutation`'s."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(length)
    return np.argsort(raw, kind="stable")
