"""Several processes build one cache and read one order; a killed one leaves what it had committed."""

import json
import multiprocessing
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import data_worker
from atelier_api.run_file import RunFile
from data_worker import Mischief
from tiny_data import training_run_file, write_pictures, write_truncated_picture

NONE = Mischief()
pytestmark = pytest.mark.processes


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> RunFile:
    write_pictures(tmp_path / "pictures", [(40, 40)] * 5 + [(64, 40)] * 2)
    write_truncated_picture(tmp_path / "pictures" / "cut.png")
    return training_run_file(tmp_path, [tmp_path / "pictures"], checkpoint, hyperparameters={"globalBatchSize": 6})


def start(run: RunFile, folder: Path, world_size: int, mischief: Mischief = NONE) -> list[dict[str, Any] | int]:
    """What each rank wrote, or its exit code where it wrote nothing. Forked: importing the libraries again takes far longer."""
    folder.mkdir()
    run.write(folder / "run.json")
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=data_worker.main, args=(folder / "run.json", rank, world_size, mischief))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    outs = [folder / f"{rank}.json" for rank in range(world_size)]
    return [
        json.loads(out.read_text()) if out.exists() else process.exitcode
        for out, process in zip(outs, ranks, strict=True)
    ]


def slots_by_step(results: list[dict[str, Any]]) -> list[dict[int, tuple[str, float, float]]]:
    """For each step: slot of the global batch to (name, weight, sum of latents), over all ranks."""
    merged = []
    for parts in zip(*(result["steps"] for result in results), strict=True):
        assert len({len(part) for part in parts}) == 1  # as many forward passes on every rank
        merged.append({slot: (name, weight, total) for part in parts for name, slot, weight, total in part})
    return merged


def test_ranks_divide_the_work_and_train_on_one_order_whatever_their_number(tmp_path: Path, run: RunFile) -> None:
    pair: Any = start(run, tmp_path / "pair", 2)
    assert [result["hash"] for result in pair] == [pair[0]["hash"]] * 2
    assert sum(result["pictures"] for result in pair) == 7
    assert sum(result["captions"] for result in pair) == 8
    assert all(result["pictures"] >= 3 and result["loads"] == 1 for result in pair)
    assert all(result["funnel"]["kept"] == 7 and result["funnel"]["unreadable"] == 1 for result in pair)
    three: Any = start(run, tmp_path / "three", 3)
    assert [(result["pictures"], result["loads"]) for result in three] == [(0, 0)] * 3
    alone: Any = start(run, tmp_path / "alone", 1)
    orders = [slots_by_step(results) for results in (pair, three, alone)]
    # Fillings may be left out with their micro-batch; whatever counts is the same, latents included.
    counting = [[{slot: value for slot, value in step.items() if value[1]} for step in order] for order in orders]
    assert counting[0] == counting[1] == counting[2]
    seen = Counter(name for step in counting[0] for name, _, _ in step.values())
    assert seen == {f"{number:03d}.png": 2 for number in range(7)}


def test_a_killed_build_goes_on_with_what_it_had_committed(tmp_path: Path, run: RunFile) -> None:
    [code] = start(run, tmp_path / "killed", 1, Mischief(kill_after=4))
    assert code == -signal.SIGKILL
    results: Any = start(run, tmp_path / "again", 1)
    [result] = results
    assert result["captions"] == 0
    assert result["pictures"] == 3
    assert result["funnel"]["kept"] == 7


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path, run: RunFile) -> None:
    data = run.spec.data.model_copy(
        update={"sources": [run.spec.data.sources[0].model_copy(update={"uri": "/nowhere"})]}
    )
    broken = run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})})
    results: Any = start(broken, tmp_path / "broken", 2)
    assert [result["error"] for result in results] == ["DataError"] * 2
    assert all("/nowhere" in result["message"] for result in results)


def test_an_error_in_one_ranks_work_is_raised_on_all(tmp_path: Path, run: RunFile) -> None:
    results: Any = start(run, tmp_path / "failing", 2, Mischief(fail_rank=1))
    assert results == [{"error": "ArithmeticError", "message": "the autoencoder fails"}] * 2


def test_a_stop_that_reaches_one_rank_ends_all_and_keeps_what_was_encoded(tmp_path: Path, run: RunFile) -> None:
    results: Any = start(run, tmp_path / "stopped", 2, Mischief(stop_rank=1))
    assert [result["error"] for result in results] == ["StopAsked"] * 2
    again: Any = start(run, tmp_path / "again", 1)
    assert again[0]["pictures"] == 3  # each rank had finished a round of two
    assert again[0]["captions"] == 0


def test_nodes_that_share_no_folder_fill_a_cache_each(tmp_path: Path, run: RunFile) -> None:
    results: Any = start(run, tmp_path / "apart", 2, Mischief(cache_per_rank=True))
    assert [result["pictures"] for result in results] == [7, 7]
    assert [result["captions"] for result in results] == [8, 8]
    assert results[0]["hash"] == results[1]["hash"]
    assert sorted(len(step) for step in slots_by_step(results)) == [2, 2, 6, 6]
