import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from atelier_api.errors import ConfigError
from atelier_runtime.data.dataset import MicroBatch
from atelier_runtime.data.loader import READ_AHEAD, Loader
from atelier_runtime.data.order import SampleOrder, Slot
from tiny_data import OneRank


class Samples:
    """A data set whose latents are the sample's number; fails at `fails_at`."""

    def __init__(self, global_batch_size: int, count: int = 10, fails_at: int = -1) -> None:
        self.order = SampleOrder(
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            tokens=(4,),
            global_batch_size=global_batch_size,
            seed=1,
        )
        self.device = OneRank().device
        self.fails_at = fails_at
        self.loaded: list[int] = []

    def load(self, slots: Sequence[Slot], *, step: int, epoch: int) -> MicroBatch:
        if step == self.fails_at:
            raise OSError("the disk fell off")
        self.loaded.append(step)
        return MicroBatch(
            latents=torch.tensor([float(slot.sample) for slot in slots]),
            std=None,
            text=[{} for _ in slots],
            sizes=torch.zeros(len(slots), 6),
            weights=torch.tensor([slot.weight for slot in slots]),
            slots=tuple(slot.index for slot in slots),
            names=tuple(str(slot.sample) for slot in slots),
        )


def make_loader(samples: Samples, *, rank: int = 0, world_size: int = 1, micro: int = 1, start_step: int = 0) -> Loader:
    dataset: Any = samples
    return Loader(dataset, rank=rank, world_size=world_size, micro_batch_size=micro, start_step=start_step)


def test_steps_come_in_order_from_the_start_step_without_end() -> None:
    samples = Samples(2)
    loader = make_loader(samples, micro=2, start_step=3)
    steps = [next(loader) for _ in range(12)]
    loader.close()
    assert [step for step, _ in steps] == list(range(3, 15))
    for step, [batch] in steps:
        assert batch.names == tuple(str(slot.sample) for slot in samples.order.batch(step).slots)
        assert batch.slots == (0, 1)


def test_ranks_together_have_the_global_batch() -> None:
    loaders = [make_loader(Samples(6), rank=rank, world_size=3) for rank in range(3)]
    parts = [next(loader)[1] for loader in loaders]
    for loader in loaders:
        loader.close()
    expected = [str(slot.sample) for slot in Samples(6).order.batch(0).slots]
    by_slot = {batch.slots[0]: batch.names[0] for part in parts for batch in part}
    assert [by_slot[index] for index in range(6)] == expected
    assert [len(part) for part in parts] == [2, 2, 2]


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"globalBatchSize is 4; it must be a multiple of the 3 processes"):
        make_loader(Samples(4), world_size=3)


def wait_for(samples: Samples, count: int) -> list[int]:
    """The steps loaded once there are `count` of them, and some time has passed in which there could be more."""
    deadline = time.monotonic() + 30
    while len(samples.loaded) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return samples.loaded


def test_only_a_few_steps_are_read_ahead() -> None:
    samples = Samples(1)
    loader = make_loader(samples)
    next(loader)
    loader.read_on()
    # One taken, READ_AHEAD waiting, and one in the thread's hand.
    assert wait_for(samples, READ_AHEAD + 2) == list(range(READ_AHEAD + 2))
    loader.close()


def test_the_place_of_a_step_is_filled_when_asked_for_and_once() -> None:
    samples = Samples(1)
    loader = make_loader(samples)
    next(loader)
    assert wait_for(samples, READ_AHEAD + 1) == list(range(READ_AHEAD + 1))
    for _ in range(3):
        loader.read_on()
    assert wait_for(samples, READ_AHEAD + 2) == list(range(READ_AHEAD + 2))
    next(loader)
    next(loader)  # who never asks gets the steps all the same
    assert wait_for(samples, READ_AHEAD + 3) == list(range(READ_AHEAD + 3))
    loader.close()


def test_errors_of_the_thread_reach_the_trainer_after_the_steps_before_them() -> None:
    loader = make_loader(Samples(1, fails_at=2))
    assert [next(loader)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="fell off"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_ends_the_thread_also_when_it_waits_for_room() -> None:
    before = threading.active_count()
    loader = make_loader(Samples(1))
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_the_time_waited_is_added_up() -> None:
    class Slow(Samples):
        def load(self, slots: Sequence[Slot], *, step: int, epoch: int) -> MicroBatch:
            time.sleep(0.05)
            return super().load(slots, step=step, epoch=epoch)

    loader = make_loader(Slow(1))
    assert loader.wait_seconds == 0
    next(loader)
    first = loader.wait_seconds
    next(loader)
    loader.close()
    assert first > 0
    assert loader.wait_seconds > first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_micro_batches_for_a_gpu_are_pinned() -> None:
    samples = Samples(1)
    samples.device = torch.device("cuda")
    loader = make_loader(samples)
    _, [batch] = next(loader)
    loader.close()
    assert batch.latents.is_pinned()
    assert batch.sizes.is_pinned()
