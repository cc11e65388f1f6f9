"""A checkpoint does not know what strategy it was made under: another one goes on from it, with another number of processes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from checkpoint_runs import TinyRun
from processes import run_ranks
from relay_ranks import Leg, Relay, relays, straight
from strategy_cases import prepared
from training_ranks import Case

pytestmark = pytest.mark.processes

DEEPSPEED = ("deepspeed-zero2", "deepspeed-zero3")
CHANGING = ("deepspeed-zero3", "fsdp2", "deepspeed-zero2", "ddp", "deepspeed-zero3")
Legs = tuple[list[Leg], list[Leg]]


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Legs]:
    """With breaks and without: each strategy of DeepSpeed after itself, and `CHANGING` with one process at the end."""
    folder = tmp_path_factory.mktemp("relay")
    case, experts = prepared([Case("sd3", "full", folder / "sd3"), Case("wan22", "lora-attention", folder / "wan22")])
    run = TinyRun.make(folder)
    changing = Relay(CHANGING, case, run.run_file, run.staging)
    before, after_itself = run_ranks(2, "relay_ranks:relays", 2, changing, DEEPSPEED, experts)[0]
    after, _ = relays(1, replace(changing, strategies=["single"]))
    return after_itself | {"changing": (before + after, straight("single", case, len(CHANGING) + 1))}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("strategy", DEEPSPEED)
def test_a_resume_under_deepspeed_goes_on_to_the_bit(strategy: str, legs: dict[str, Legs]) -> None:
    broken, unbroken = legs[strategy]
    assert [leg.step for leg in broken] == [leg.step for leg in unbroken] == [1, 2, 3]
    assert [leg.loss for leg in broken] == [leg.loss for leg in unbroken]
    assert same(broken[-1].weights, unbroken[-1].weights)
    assert same(broken[-1].averages, unbroken[-1].averages)


def test_strategies_and_numbers_of_processes_follow_each_other(legs: dict[str, Legs]) -> None:
    changing, alone = legs["changing"]
    assert [leg.step for leg in changing] == list(range(1, len(CHANGING) + 2))
    assert [leg.loss for leg in changing] == pytest.approx([leg.loss for leg in alone], rel=1e-5)
    for name, weight in alone[-1].weights.items():
        torch.testing.assert_close(changing[-1].weights[name], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(changing[-1].averages[name], alone[-1].averages[name], rtol=1e-4, atol=1e-5)
