"""Two processes under DeepSpeed's ZeRO train what one does.

ZeRO-3 takes every family apart, so every family is tried. ZeRO-2 leaves the denoiser whole, as DDP does, and one of each kind will do.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atelier_api.families import NAMES
from processes import run_ranks
from strategy_cases import EACH_KIND, assert_near_training, assert_same_training, distance, prepared
from training_ranks import STEPS, Case, Trained, train_all

pytestmark = pytest.mark.processes

ZERO2, ZERO3 = "deepspeed-zero2", "deepspeed-zero3"


def fp32_cases(strategy: str, folder: Path) -> Iterator[Case]:
    for family in NAMES if strategy == ZERO3 else EACH_KIND:
        case = Case(family, "lora", folder / family, draws=family in EACH_KIND)
        yield replace(case, adapter="full")
        if family in EACH_KIND:
            yield replace(case, checkpointing=True)
        else:
            # What DeepSpeed takes for each layer grows with the square of how many there are; and it is the second step that does,
            # by the order that the first has shown. The full rank above takes two.
            yield replace(case, adapter="lora-attention", checkpointing=True, steps=1)
        if family == "sd3":
            yield replace(case, adapter="full", accumulation=2)
            yield replace(case, adapter="dylora", checkpointing=True)  # trains another block in each step
            yield replace(case, strengths=(1.5, 0.0, -2.0), checkpointing=True, steps=3)
        if family == "sd3" and strategy == ZERO3:  # these are about layers that are taken apart
            yield replace(case, adapter="lokr", checkpointing=True)
            yield replace(case, adapter="boft")  # computes with the base's weights, which are sharded
            yield replace(case, adapter="ia3", checkpointing=True)
            yield replace(case, adapter="full", checkpointing=True, layer_sync=(0, 2))
    # A call for each sample, with hooks inside of what the engine hears of once.
    yield Case("hunyuan_video15", "lora-attention", folder / "hunyuan_video15", checkpointing=True, layer_sync=(0, 1))
    yield Case("wan22", "lora-attention", folder / "wan22")  # two experts, trained in turn


def without_end(folder: Path) -> Case:
    return Case("sd3", "lora-attention", folder / "sd3", weight=float("inf"))


def bf16_cases(folder: Path) -> Iterator[Case]:
    case = Case("wan", "lora", folder / "wan", precision="bf16")  # it keeps some modules in fp32
    yield replace(case, checkpointing=True)
    yield replace(case, adapter="full")
    yield replace(case, adapter="lokr")


def names(cases: Iterator[Case]) -> list[str]:
    return [case.name for case in cases]


NOWHERE = Path()
FP32 = [(strategy, case) for strategy in (ZERO2, ZERO3) for case in names(fp32_cases(strategy, NOWHERE))]
BF16 = [(strategy, case) for strategy in (ZERO2, ZERO3) for case in names(bf16_cases(NOWHERE))]
WITHOUT_END = without_end(NOWHERE).name
Results = dict[tuple[str, str], Trained]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results, Results]:
    """Results of one process, and of the two ranks of two."""
    folder = tmp_path_factory.mktemp("tiny")
    ready = prepared([*fp32_cases(ZERO3, folder), *bf16_cases(folder), without_end(folder)])
    tried = {*FP32, *BF16, (ZERO2, WITHOUT_END), (ZERO3, WITHOUT_END)}
    ways = [(strategy, case) for strategy in (ZERO2, ZERO3) for case in ready if (strategy, case.name) in tried]
    alone = train_all(1, [("single", case) for case in ready])
    return alone, *run_ranks(2, "training_ranks:train_all", 2, ways, timeout=600)


def pair(trained: tuple[Results, Results, Results], strategy: str, case: str) -> tuple[Trained, Trained]:
    """What one process made of the case, and what rank 0 of two did."""
    alone, together = trained[0]["single", case], trained[1][strategy, case]
    assert not isinstance(alone, str), alone
    assert not isinstance(together, str), together
    return alone, together


@pytest.mark.parametrize(
    ("strategy", "case"),
    [pytest.param(*each, marks=[pytest.mark.cell("zero3")] if each[0] == ZERO3 else []) for each in FP32],
)
def test_two_processes_train_what_one_does(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = pair(trained, strategy, case)
    assert_same_training(together, alone)
    assert alone.drawn.numel() or case.partition(" ")[0] not in EACH_KIND


@pytest.mark.parametrize(("strategy", "case"), BF16)
def test_two_processes_train_what_one_does_in_bf16(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = pair(trained, strategy, case)
    assert_near_training(together, alone)


@pytest.mark.parametrize(("strategy", "case"), [*FP32, *BF16])
def test_only_the_first_rank_is_given_the_whole_weights(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    pair(trained, strategy, case)
    first, second = trained[1][strategy, case], trained[2][strategy, case]
    assert first.weights
    assert not second.weights
    assert first.losses == second.losses
    assert distance(second.averages, first.averages, first.before) == 0


@pytest.mark.parametrize(("strategy", "case"), [*FP32, *BF16])
def test_zero3_leaves_half_of_everything_on_each_rank(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = pair(trained, strategy, case)
    share = together.local_elements / alone.local_elements
    assert share == 1 if strategy == ZERO2 else 0.5 <= share < 0.52


@pytest.mark.parametrize("strategy", [ZERO2, ZERO3])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_is_told(trained, strategy: str) -> None:  # type: ignore[no-untyped-def]
    together = pair(trained, strategy, WITHOUT_END)[1]
    assert together.norms == [float("inf")] * STEPS
    assert all(torch.equal(weight, together.before[name]) for name, weight in together.weights.items())


def test_matrices_of_a_whole_model_travel_in_bf16_and_nothing_does_in_fp32(trained) -> None:  # type: ignore[no-untyped-def]
    assert pair(trained, ZERO3, "wan full bf16 adamw keep x1")[1].rounded_in_a_block
    assert not pair(trained, ZERO3, "wan full fp32 adamw keep x1")[1].rounded_in_a_block
