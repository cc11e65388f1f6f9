"""Whole runs with LayerSync: a resume is a straight run, and the report shows its loss. Ranks are forks (see `runs`)."""

import json
from pathlib import Path

import pytest

from runs import LocalRun, checkpoint_state, history, tiny_run

pytestmark = pytest.mark.processes

STEPS = 4


def synced(folder: Path, name: str, steps: int = STEPS) -> LocalRun:
    folder = folder / name
    folder.mkdir(exist_ok=True)
    return tiny_run(
        folder,
        name=name,
        hyperparameters={"steps": steps},
        techniques={"layerSync": {"studentBlock": 0, "teacherBlock": 2, "weight": "0.5"}},
        parallelism={"processesPerNode": 1},
    )


def alignment(run: LocalRun) -> list[tuple[int, float]]:
    """(step, loss) of LayerSync, as the run kept them."""
    head = json.loads((run.folder / "logs" / "history.jsonl").read_text().splitlines()[0])
    return [(step, loss) for step, loss in head["techniques"]["layerSync"]]


def test_a_resume_trains_what_a_straight_run_does(tmp_path: Path) -> None:
    straight = synced(tmp_path, "straight")
    straight.train_in_forks()
    synced(tmp_path, "resumed", steps=2).train_in_forks()
    resumed = synced(tmp_path, "resumed")
    resumed.train_in_forks()
    expected, found = checkpoint_state(straight, STEPS), checkpoint_state(resumed, STEPS)
    assert expected.keys() == found.keys()
    assert [key for key, tensor in expected.items() if not tensor.equal(found[key])] == []
    assert history(resumed) == history(straight)
    assert alignment(resumed) == alignment(straight)
    assert [step for step, _ in alignment(straight)] == list(range(STEPS))
    assert all(-0.5 <= loss < 0 for _, loss in alignment(straight))
    assert "<h2>Loss of layerSync</h2>" in (straight.folder / "report.html").read_text()
