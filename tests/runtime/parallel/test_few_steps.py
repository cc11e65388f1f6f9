"""Two processes train the few-step generator that one does: passes without gradient between those of the strategies."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from processes import run_ranks
from strategy_cases import assert_same_training, prepared
from training_ranks import Case, Trained, train_all

pytestmark = pytest.mark.processes

STRATEGIES = ("ddp", "fsdp2")


def cases(folder: Path) -> Iterator[Case]:
    case = Case("sd3", "lora", folder / "sd3", few_steps=True)
    yield replace(case, checkpointing=True)
    yield replace(case, accumulation=2)
    yield replace(case, adapter="full", checkpointing=True, layer_sync=(0, 2))
    yield replace(case, quantization="int8")


def bf16_cases(folder: Path) -> Iterator[Case]:
    case = Case("sd3", "lora", folder / "sd3", few_steps=True, precision="bf16")
    yield replace(case, checkpointing=True)
    yield replace(case, adapter="full", optimizer="adamw-bf16")


BF16 = [case.name for case in bf16_cases(Path())]
NAMES = [case.name for case in cases(Path())]
Results = dict[tuple[str, str], Trained]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results, Results]:
    """Results of one process, and of the two ranks of two."""
    folder = tmp_path_factory.mktemp("tiny")
    ready = prepared([*cases(folder), *bf16_cases(folder)])
    alone = train_all(1, list(product(["single"], ready)))
    return alone, *run_ranks(2, "training_ranks:train_all", 2, list(product(STRATEGIES, ready)), timeout=600)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", NAMES)
def test_two_processes_train_what_one_does(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = trained[0]["single", case], trained[1][strategy, case]
    assert not isinstance(alone, str), alone
    assert not isinstance(together, str), together
    assert_same_training(together, alone)
    told = {name: weight for name, weight in alone.weights.items() if ".few_steps." in name}
    assert len(told) == 5  # two layers, and the vector of negative times
    assert all(not torch.equal(weight, alone.before[name]) for name, weight in told.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", BF16)
def test_two_processes_start_in_bf16_where_one_does(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    """Then they part: a target divides the differences of rounded predictions by delta."""
    alone, together = trained[0]["single", case], trained[1][strategy, case]
    assert not isinstance(alone, str), alone
    assert not isinstance(together, str), together
    assert together.losses[0] == pytest.approx(alone.losses[0], rel=0.02)
    assert together.losses == trained[2][strategy, case].losses
    assert all(weight.isfinite().all() for weight in together.weights.values())
