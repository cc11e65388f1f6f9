from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_runtime.data.loader import rank_slots
from atelier_runtime.data.order import SampleOrder


def make_order(buckets: list[int], repeats: list[int], global_batch_size: int, seed: int = 7) -> SampleOrder:
    return SampleOrder(
        np.array(buckets, np.int32),
        np.array(repeats, np.int32),
        tokens=tuple(100 + bucket for bucket in range(max(buckets) + 1)),
        global_batch_size=global_batch_size,
        seed=seed,
    )


@st.composite
def sample_sets(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Buckets and repeats of up to 40 samples; every bucket up to the highest has one."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    buckets = draw(st.permutations([bucket for bucket, size in enumerate(sizes) for _ in range(size)]))
    repeats = draw(st.lists(st.integers(0, 3), min_size=len(buckets), max_size=len(buckets)))
    return list(buckets), repeats


@settings(max_examples=60, deadline=None)
@given(sample_sets(), st.integers(1, 7), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2))
def test_over_an_epoch_the_ranks_together_see_every_sample_repeats_plus_one_times(
    samples: tuple[list[int], list[int]], world_size: int, micro_batch_size: int, per_rank: int, epoch: int
) -> None:
    buckets, repeats = samples
    order = make_order(buckets, repeats, world_size * per_rank)
    seen: Counter[int] = Counter()
    first = epoch * order.steps_per_epoch
    for step in range(first, first + order.steps_per_epoch):
        batch = order.batch(step)
        assert batch.epoch == epoch
        assert {buckets[slot.sample] for slot in batch.slots} == {batch.bucket}
        parts = [rank_slots(batch, rank, world_size, micro_batch_size) for rank in range(world_size)]
        # Every rank makes the same number of forward passes of the same size, or a collective would hang.
        assert len({tuple(map(len, part)) for part in parts}) == 1
        dealt = [slot for part in parts for micro_batch in part for slot in micro_batch]
        assert len({slot.index for slot in dealt}) == len(dealt)
        assert {slot for slot in batch.slots if slot.weight} <= set(dealt) <= set(batch.slots)
        seen.update(slot.sample for slot in dealt if slot.weight)
    assert seen == Counter({sample: times + 1 for sample, times in enumerate(repeats)})


@settings(max_examples=30, deadline=None)
@given(sample_sets(), st.integers(0, 200))
def test_the_order_does_not_know_the_number_of_ranks(samples: tuple[list[int], list[int]], step: int) -> None:
    """A resumed run of another world size goes on with the same samples: each batch is put together from its ranks' slots."""
    batch = make_order(*samples, global_batch_size=12).batch(step)
    for world_size in (1, 2, 3, 4, 6):
        parts = [rank_slots(batch, rank, world_size, 12 // world_size) for rank in range(world_size)]
        together = sorted((slot for part in parts for micro in part for slot in micro), key=lambda slot: slot.index)
        assert tuple(together) == batch.slots


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    buckets, repeats = [0, 1, 0, 1, 1, 2], [0, 1, 0, 2, 0, 0]
    order = make_order(buckets, repeats, 2)
    forwards = [order.batch(step) for step in range(40)]
    other = make_order(buckets, repeats, 2)
    assert [other.batch(step) for step in reversed(range(40))] == forwards[::-1]
    assert [make_order(buckets, repeats, 2, seed=8).batch(step) for step in range(40)] != forwards


def test_the_order_of_a_seed_never_changes() -> None:
    """A later release must not resume an old run with other samples."""
    order = make_order([0, 1, 0, 1, 0, 0, 0], [0] * 7, 2, seed=42)
    assert [[slot.sample for slot in order.batch(step).slots] for step in range(4)] == [[1, 3], [4, 6], [0, 4], [2, 5]]


def test_epochs_are_shuffled_differently_in_samples_and_in_buckets() -> None:
    order = make_order([0] * 50 + [1] * 50, [0] * 100, 5)
    epochs = [[order.batch(step) for step in range(epoch * 20, epoch * 20 + 20)] for epoch in range(3)]
    samples = [[slot.sample for batch in epoch if batch.bucket == 0 for slot in batch.slots] for epoch in epochs]
    assert sorted(samples[0]) == sorted(samples[1]) == list(range(50))
    assert samples[0] != samples[1] != samples[2] != list(range(50))
    buckets = [[batch.bucket for batch in epoch] for epoch in epochs]
    assert buckets[0] != buckets[1] != buckets[2]
    assert 0 < sum(buckets[0][:10]) < 10  # not bucket after bucket


def test_short_batches_are_filled_with_samples_of_their_bucket_at_weight_zero() -> None:
    order = make_order([0, 0, 0, 1], [0, 0, 0, 0], 2)
    assert order.steps_per_epoch == 3
    assert order.samples_per_epoch == 4
    batches = [order.batch(step) for step in range(3)]
    assert sorted(batch.total_weight for batch in batches) == [1, 1, 2]
    single = next(batch for batch in batches if batch.bucket == 1)
    assert [slot.sample for slot in single.slots] == [3, 3]
    assert [slot.weight for slot in single.slots] == [1.0, 0.0]
    assert single.tokens == 101
    assert [slot.index for slot in single.slots] == [0, 1]


def test_micro_batches_of_fillings_alone_are_left_out_on_all_ranks() -> None:
    batch = make_order([0] * 5, [0] * 5, 16).batch(0)
    parts = [rank_slots(batch, rank, world_size=2, micro_batch_size=2) for rank in range(2)]
    assert [[[slot.index for slot in micro] for micro in part] for part in parts] == [
        [[0, 2], [4, 6]],
        [[1, 3], [5, 7]],
    ]
    # Rank 1's second micro-batch is all filling, but rank 0's is not, and both must take part in the collective.
    assert [slot.weight for slot in parts[1][1]] == [0.0, 0.0]
    assert [slot.weight for slot in parts[0][1]] == [1.0, 0.0]


def test_a_million_samples_are_ordered_with_only_permutations_in_memory() -> None:
    count = 1_000_000
    order = SampleOrder(
        np.arange(count, dtype=np.int32) % 7,
        np.zeros(count, np.int32),
        tokens=(1,) * 7,
        global_batch_size=64,
        seed=1,
    )
    assert order.samples_per_epoch == count
    per_epoch = order.steps_per_epoch
    for epoch in range(5):
        for step in range(epoch * per_epoch, epoch * per_epoch + 40):
            order.batch(step)
    kept = sum(permutation.nbytes for permutation in order._shuffled.values())
    assert kept <= 2 * 8 * (count + per_epoch)
    assert len(order._batches) <= 8


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(np.zeros(0, np.int32), np.zeros(0, np.int32), tokens=(), global_batch_size=1, seed=0)
