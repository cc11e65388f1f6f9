"""The order of a slider: signs take turns, a batch has one strength, and inside its sign every sample keeps its share."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_runtime.data.loader import rank_slots
from atelier_runtime.data.order import SampleOrder, SliderOrder

STRENGTHS = (-2.0, -1.0, 0.0, 0.5, 1.0)


def make_order(
    buckets: list[int], repeats: list[int], strengths: tuple[float, ...], size: int, seed: int = 7
) -> SliderOrder:
    return SliderOrder(
        np.array(buckets, np.int32),
        np.array(repeats, np.int32),
        strengths=strengths,
        tokens=tuple(100 + bucket for bucket in range(len(strengths))),
        global_batch_size=size,
        seed=seed,
    )


@st.composite
def sample_sets(draw: st.DrawFn) -> tuple[list[int], list[int], tuple[float, ...]]:
    """Buckets and repeats of samples, and the strength of each bucket."""
    strengths = draw(st.lists(st.sampled_from(STRENGTHS), min_size=1, max_size=6))
    sizes = [draw(st.integers(1, 9)) for _ in strengths]
    buckets = draw(st.permutations([bucket for bucket, size in enumerate(sizes) for _ in range(size)]))
    repeats = draw(st.lists(st.integers(0, 2), min_size=len(buckets), max_size=len(buckets)))
    return list(buckets), repeats, tuple(strengths)


@settings(max_examples=60, deadline=None)
@given(sample_sets(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_signs_take_turns_and_every_sample_keeps_its_share_inside_its_own(
    samples: tuple[list[int], list[int], tuple[float, ...]], world_size: int, micro_batch_size: int, per_rank: int
) -> None:
    buckets, repeats, strengths = samples
    order = make_order(buckets, repeats, strengths, world_size * per_rank)
    signs = [sign for sign in (1.0, -1.0, 0.0) if sign in np.sign(strengths)]
    assert len(order.parts) == len(signs)
    seen: dict[tuple[float, int], Counter[int]] = {}
    for step in range(2 * order.steps_per_epoch):
        batch = order.batch(step)
        assert batch.step == step
        assert np.sign(batch.strength) == signs[step % len(signs)]
        parts = [rank_slots(batch, rank, world_size, micro_batch_size) for rank in range(world_size)]
        dealt = [slot for part in parts for micro_batch in part for slot in micro_batch]
        # All ranks, and all micro-batches: the filling too, which is computed though it does not count.
        assert {strengths[buckets[slot.sample]] for slot in dealt} == {batch.strength}
        assert {buckets[slot.sample] for slot in batch.slots} == {batch.bucket}
        assert batch.tokens == 100 + batch.bucket
        counted = seen.setdefault((signs[step % len(signs)], batch.epoch), Counter())
        counted.update(slot.sample for slot in dealt if slot.weight)
    whole = {
        sign: Counter({s: times + 1 for s, times in enumerate(repeats) if np.sign(strengths[buckets[s]]) == sign})
        for sign in signs
    }
    for (sign, epoch), counted in seen.items():
        last = max(other for of, other in seen if of == sign)
        assert counted == whole[sign] if epoch < last else counted <= whole[sign]
    for sign in signs:
        assert seen[sign, 0] == whole[sign]  # one epoch is enough for each of them


def test_the_sign_with_fewer_samples_shows_them_more_often() -> None:
    """Both ends get as many steps."""
    order = make_order([0] * 8 + [1] * 2, [0] * 10, (1.0, -1.0), 2)
    shown = Counter(slot.sample for step in range(order.steps_per_epoch) for slot in order.batch(step).slots)
    assert order.steps_per_epoch == 8
    assert shown == Counter(dict.fromkeys(range(8), 1) | dict.fromkeys((8, 9), 4))


def test_a_step_is_a_pure_function_of_seed_and_step() -> None:
    arguments = ([0, 1, 0, 2, 1, 3, 2, 2], [0, 1, 0, 2, 0, 0, 1, 0], (1.0, -1.0, -2.0, 0.0))
    forwards = [make_order(*arguments, 2).batch(step) for step in range(40)]
    other = make_order(*arguments, 2)
    assert [other.batch(step) for step in reversed(range(40))] == forwards[::-1]
    assert [make_order(*arguments, 2, seed=8).batch(step) for step in range(40)] != forwards


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """A run that goes on after an update must see what it would have seen."""
    order = make_order([0, 1, 0, 1, 2, 0, 1], [0] * 7, (1.0, -1.0, -2.0), 2, seed=42)
    batches = [order.batch(step) for step in range(6)]
    assert [batch.strength for batch in batches] == [1.0, -1.0, 1.0, -2.0, 1.0, -1.0]
    shown = [[slot.sample for slot in batch.slots] for batch in batches]
    assert shown == [[5, 2], [1, 3], [0, 5], [4, 4], [2, 0], [6, 1]]


def test_a_sign_is_ordered_as_a_training_set_of_its_own() -> None:
    order = make_order([0, 1, 0, 1, 0, 0, 0], [0] * 7, (1.0, 1.0), 2, seed=42)
    alone = SampleOrder(
        np.array([0, 1, 0, 1, 0, 0, 0], np.int32),
        np.zeros(7, np.int32),
        tokens=(100, 101),
        global_batch_size=2,
        seed=42,
    )
    assert [order.batch(step) for step in range(20)] == [alone.batch(step) for step in range(20)]
