"""Two processes train what one does: every family by LoRA and full-rank, other adapters and quantised bases on some; DDP and FSDP2.

Everything is trained once, in one pair of processes, and looked at by many tests. DeepSpeed's strategies are in `test_zero`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from atelier_api.families import NAMES
from control_cases import CONTROLLED
from processes import run_ranks
from strategy_cases import EACH_KIND, assert_near_training, assert_same_training, distance, prepared
from training_ranks import STEPS, Case, Trained, train_all

pytestmark = pytest.mark.processes

STRATEGIES = ("ddp", "fsdp2")


def fp32_cases(folder: Path) -> Iterator[Case]:
    for family in NAMES:
        kind = family in EACH_KIND
        case = Case(family, "lora" if kind else "lora-attention", folder / family, draws=kind)
        yield replace(case, checkpointing=True)
        # LoRA takes two steps in any case: in the first, its first matrices have no gradient.
        yield replace(case, adapter="full", steps=STEPS if kind else 1)
        if family in CONTROLLED:
            yield replace(case, adapter="controlnet", checkpointing=True)
        if family == "auraflow":  # its network is called in the middle of the base's pass
            yield replace(case, adapter="controlnet", quantization="int8")
        if family == "sdxl":  # rows of its text encoders, which lie outside of what is sharded and wrapped
            yield replace(case, adapter="textual-inversion", checkpointing=True)
            yield replace(case, adapter="textual-inversion", quantization="fp8")
        if family == "sd3":
            yield replace(case, adapter="controlnet")  # a pass that recomputes does all that this one does
            yield replace(case, adapter="controlnet", accumulation=2)
            yield replace(case, adapter="controlnet", quantization="int8")
            yield case
            yield replace(case, adapter="full", checkpointing=True)
            yield replace(case, adapter="lokr", checkpointing=True)  # beside the layers' output
            # computes with the base's weights, which are sharded
            yield replace(case, adapter="boft", checkpointing=True)
            yield replace(case, adapter="dylora", checkpointing=True)  # trains another block in each step
            yield replace(case, adapter="ia3", checkpointing=True)
            yield replace(case, strengths=(1.5, 0.0, -2.0), accumulation=2, steps=3)
            yield replace(case, adapter="boft", strengths=(1.5, -2.0), checkpointing=True)
            yield replace(case, accumulation=2)
            yield replace(case, adapter="full", accumulation=2)
            yield replace(case, quantization="int8")
            yield replace(case, adapter="boft", quantization="int8")
            # hooks inside of what is sharded and wrapped
            yield replace(case, adapter="full", checkpointing=True, layer_sync=(0, 2))
        if family == "hunyuan_video15":  # a call for each sample
            yield replace(case, checkpointing=True, layer_sync=(0, 1))
        if family in ("sd3", "wan"):
            yield replace(case, quantization="nf4", checkpointing=True)
        if family in ("sdxl", "flux"):
            yield replace(case, quantization="fp8", checkpointing=True)


def bf16_cases(folder: Path) -> Iterator[Case]:
    for optimizer in ("adamw", "adamw-bf16"):
        yield Case("flux", "controlnet", folder / "flux", precision="bf16", optimizer=optimizer)
    case = Case("wan", "lora", folder / "wan", precision="bf16")  # it keeps some modules in fp32
    for optimizer in ("adamw", "adamw-bf16"):
        yield replace(case, optimizer=optimizer, checkpointing=True)
        yield replace(case, adapter="full", optimizer=optimizer)
        yield replace(case, adapter="lokr", optimizer=optimizer)
    yield replace(case, quantization="nf4", checkpointing=True)


def names(cases: Iterator[Case]) -> list[str]:
    return [case.name for case in cases]


NOWHERE = Path()
FP32, BF16 = names(fp32_cases(NOWHERE)), names(bf16_cases(NOWHERE))
Results = dict[tuple[str, str], Trained]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results, Results]:
    """Results of one process, and of the two ranks of two."""
    folder = tmp_path_factory.mktemp("tiny")
    ready = prepared([*fp32_cases(folder), *bf16_cases(folder)])
    alone = train_all(1, list(product(["single"], ready)))
    return alone, *run_ranks(2, "training_ranks:train_all", 2, list(product(STRATEGIES, ready)), timeout=600)


def pair(trained: tuple[Results, Results, Results], strategy: str, case: str) -> tuple[Trained, Trained]:
    """What one process made of the case, and what rank 0 of two did."""
    alone, together = trained[0]["single", case], trained[1][strategy, case]
    assert not isinstance(alone, str), alone
    assert not isinstance(together, str), together
    return alone, together


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=pytest.mark.cell(name)) for name in STRATEGIES])
@pytest.mark.parametrize("case", FP32)
def test_two_processes_train_what_one_does(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = pair(trained, strategy, case)
    assert_same_training(together, alone)
    assert alone.drawn.numel() or case.partition(" ")[0] not in EACH_KIND


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", BF16)
def test_two_processes_train_what_one_does_in_bf16(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = pair(trained, strategy, case)
    # Shards are rounded with random numbers of their own: weights then agree up to the noise of the rounding.
    rounds_apart = strategy == "fsdp2" and re.search("(full|controlnet) bf16 adamw-bf16", case) is not None
    assert_near_training(together, alone, weights=0.2 if rounds_apart else 0.03)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [*FP32, *BF16])
def test_only_the_first_rank_is_given_the_whole_weights(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    pair(trained, strategy, case)
    first, second = trained[1][strategy, case], trained[2][strategy, case]
    assert first.weights
    assert not second.weights
    assert first.losses == second.losses
    assert first.averages.keys() == second.averages.keys()
    assert all(torch.equal(average, second.averages[name]) for name, average in first.averages.items())


@pytest.mark.parametrize("case", [case for case in FP32 if "layersync" in case])
def test_a_loss_beside_the_objectives_is_trained_on(trained, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, plain = trained[0]["single", case], trained[0]["single", case.removesuffix(" layersync")]
    assert all(one < other for one, other in zip(alone.losses, plain.losses, strict=True))
    assert distance(alone.weights, plain.weights, plain.before) > 1e-3


@pytest.mark.parametrize("adapter", ["lora", "full", "controlnet"])
def test_two_accumulated_micro_batches_are_one_of_twice_the_size(trained, adapter: str) -> None:  # type: ignore[no-untyped-def]
    for strategy in STRATEGIES:
        once = pair(trained, strategy, f"sd3 {adapter} fp32 adamw keep x1")[1]
        twice = pair(trained, strategy, f"sd3 {adapter} fp32 adamw keep x2")[1]
        assert twice.losses == pytest.approx(once.losses, rel=1e-5)
        assert distance(twice.weights, once.weights, once.before) < 1e-4


@pytest.mark.parametrize("case", [*FP32, *BF16])
def test_fsdp_leaves_half_of_what_it_shards_on_each_rank(trained, case: str) -> None:  # type: ignore[no-untyped-def]
    alone, together = pair(trained, "fsdp2", case)
    sharded = alone.local_elements - together.reduced_elements
    halves = together.local_elements - together.reduced_elements
    other = trained[2]["fsdp2", case].local_elements - together.reduced_elements
    assert halves + other == sharded
    assert halves < 0.52 * sharded


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [case for case in FP32 if " full " not in case and " controlnet " not in case])
def test_an_adapter_reduces_the_gradients_of_the_adapter_and_no_more(trained, strategy: str, case: str) -> None:  # type: ignore[no-untyped-def]
    together = pair(trained, strategy, case)[1]
    assert together.reduced_elements == sum(weight.numel() for weight in together.weights.values())


def test_sharded_fp32_weights_compute_in_bf16_but_for_modules_kept_in_fp32(trained) -> None:  # type: ignore[no-untyped-def]
    together = pair(trained, "fsdp2", "wan full bf16 adamw keep x1")[1]
    assert together.dtypes_in_a_block == {"torch.bfloat16", "torch.float32"}
    assert 0 < together.reduced_elements < 0.1 * sum(weight.numel() for weight in together.weights.values())
    assert {weight.dtype for weight in together.weights.values()} == {torch.float32}
