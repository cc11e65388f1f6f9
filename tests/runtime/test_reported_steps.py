"""Steps in the progress file: worked out when it is written, and never behind what else is said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from atelier_api.progress import CheckpointReport, Progress
from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_runtime import reporter as reporter_module
from atelier_runtime.observe.metrics import TrainMetrics
from atelier_runtime.observe.progress import ProgressWriter, read_progress
from atelier_runtime.reporter import Reporter
from atelier_runtime.step_agreement import StepFacts


class Run:
    """A reporter whose progress is written every second of a clock that the test moves."""

    def __init__(self, path: Path | None) -> None:
        self.now = 0.0
        self.path = path
        run_file: Any = SimpleNamespace(spec=SimpleNamespace(hyperparameters=Hyperparameters(steps=100)))
        store: Any = None
        progress = ProgressWriter(path, clock=lambda: self.now)
        self.reporter = Reporter(run_file, store, progress, TrainMetrics(0, registry=CollectorRegistry()))
        self.reporter.training(0)

    def step(self, step: int, seconds: float = 0.3) -> None:
        self.now += seconds
        self.reporter.learning_rate = 1e-4 * step
        self.reporter.step_finished(step + 1, seconds, pixels=1.0, data_wait_seconds=0.0)
        self.reporter.step_confirmed(StepFacts(step, 0.5 + step, 1.0, False, False), {"layerSync": -0.1 * step})

    @property
    def progress(self) -> Progress:
        assert self.path is not None
        found = read_progress(self.path)
        assert found is not None
        return found


def test_a_step_is_shown_when_a_second_has_passed(tmp_path: Path) -> None:
    run = Run(tmp_path / "progress.json")
    seen = []
    for step in range(8):
        run.step(step)
        seen.append(run.progress.step)
    assert seen == [0, 0, 0, 4, 4, 4, 4, 8]
    assert run.progress.loss == pytest.approx(sum(0.5 + step for step in range(8)) / 8)
    assert run.progress.learning_rate == pytest.approx(7e-4)
    assert run.progress.done == 8


def test_a_new_stage_shows_the_newest_step_and_its_own_count(tmp_path: Path) -> None:
    run = Run(tmp_path / "progress.json")
    run.step(0)
    run.step(1)
    run.reporter.stage("Sampling", "drawing", done=1, total=3)
    assert (run.progress.stage, run.progress.step, run.progress.loss) == ("Sampling", 2, 1.0)
    assert (run.progress.done, run.progress.total) == (1, 3)


def test_a_finished_checkpoint_shows_the_newest_step(tmp_path: Path) -> None:
    run = Run(tmp_path / "progress.json")
    run.step(0)
    report = CheckpointReport(step=1, manifest="m", size_bytes=1, manifest_sha256="0" * 64, time="2026-01-01T00:00:00Z")
    outcome = SimpleNamespace(step=1, report=report, save_seconds=0.1, upload_seconds=0.1)
    saves: Any = SimpleNamespace(poll=lambda: [outcome])
    run.reporter.poll(saves)
    assert run.progress.step == 1
    assert run.progress.checkpoint == report


def test_what_is_not_written_is_not_worked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(reporter_module, "peak_memory_bytes", lambda: len(asked.append(1) or asked))
    for path, expected in ((tmp_path / "progress.json", 1), (None, 0)):
        asked.clear()
        run = Run(path)
        for step in range(6):
            run.step(step)
        assert len(asked) == expected
        assert [row[0] for row in run.reporter.history.rows] == list(range(6))
        assert run.reporter.history.techniques == {"layerSync": [(step, -0.1 * step) for step in range(6)]}
