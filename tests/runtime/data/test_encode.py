from collections.abc import Sequence

import pytest
import torch

from atelier_runtime.data.encode import Budget


class Device:
    """Doubles numbers; runs out of memory above `fits` at once."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.tried: list[int] = []

    def encode(self, batch: Sequence[int]) -> list[int]:
        self.tried.append(len(batch))
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * number for number in batch]


def test_batches_are_as_large_as_the_budget_allows() -> None:
    device = Device(100)
    assert Budget(units=100, most=8).run(range(20), 10, device.encode) == list(range(0, 40, 2))
    assert device.tried == [8, 8, 4]
    device.tried.clear()
    Budget(units=100, most=8).run(range(4), 40, device.encode)
    assert device.tried == [2, 2]


def test_a_sample_over_the_budget_is_encoded_alone() -> None:
    device = Device(100)
    Budget(units=100, most=8).run(range(2), 1000, device.encode)
    assert device.tried == [1, 1]


def test_batches_are_halved_down_to_one_when_memory_runs_out_and_stay_small() -> None:
    device = Device(1)
    budget = Budget(units=64, most=64)
    assert budget.run(range(7), 8, device.encode) == list(range(0, 14, 2))
    assert device.tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    device.tried.clear()
    budget.run(range(4), 4, device.encode)  # smaller samples: two have the pixels of one that fitted
    assert device.tried == [2, 1, 1, 1, 1]


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    device = Device(0)
    with pytest.raises(torch.OutOfMemoryError):
        Budget(units=4, most=4).run(range(4), 1, device.encode)
    assert device.tried == [4, 2, 1]
