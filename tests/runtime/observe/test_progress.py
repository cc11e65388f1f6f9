"""The progress file and the estimate of the time left."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from atelier_runtime.observe.progress import EtaEstimator, ProgressWriter, read_progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_facts_add_up_and_read_back(tmp_path: Path) -> None:
    writer = ProgressWriter(tmp_path / "deep" / "progress.json", every_seconds=0)
    writer.update(stage="Training", step=3)
    writer.update(loss=0.5)
    progress = read_progress(tmp_path / "deep" / "progress.json")
    assert progress is not None
    assert (progress.stage, progress.step, progress.loss) == ("Training", 3, 0.5)
    assert progress.updated_at.endswith("+00:00")


def test_writes_are_throttled_but_a_new_stage_is_not(tmp_path: Path) -> None:
    path, clock = tmp_path / "progress.json", Clock()
    writer = ProgressWriter(path, every_seconds=0.5, clock=clock)
    seen = []
    for moment, fields in [
        (0.0, {"step": 1}),
        (0.4, {"step": 2}),
        (0.5, {"step": 3}),
        (0.6, {"stage": "Sampling"}),
        (0.7, {"step": 9}),
    ]:
        clock.now = 100 + moment
        writer.update(**fields)
        progress = read_progress(path)
        assert progress is not None
        seen.append((progress.stage, progress.step))
    assert seen == [("Preparing", 1), ("Preparing", 1), ("Preparing", 3), ("Sampling", 3), ("Sampling", 3)]
    writer.flush()
    assert read_progress(path).step == 9  # type: ignore[union-attr]


def test_a_loss_that_is_not_finite_is_absent(tmp_path: Path) -> None:
    writer = ProgressWriter(tmp_path / "progress.json")
    writer.update(loss=float("nan"))
    assert read_progress(tmp_path / "progress.json").loss is None  # type: ignore[union-attr]


def test_an_unknown_fact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="stepp"):
        ProgressWriter(tmp_path / "progress.json").update(stepp=1)


def test_other_ranks_write_nothing() -> None:
    writer = ProgressWriter(None)
    writer.update(step=1)
    writer.flush()


def test_a_disk_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    writer = ProgressWriter(tmp_path / "file" / "progress.json", every_seconds=0)
    writer.update(step=1)
    writer.update(step=2)
    assert [record.message for record in caplog.records] == ["progress cannot be written"]


def test_half_a_file_is_no_progress(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"stage": "Tra')
    assert read_progress(tmp_path / "progress.json") is None
    assert read_progress(tmp_path / "missing.json") is None


def test_time_left_is_the_median_of_recent_steps() -> None:
    eta = EtaEstimator(total_steps=100, window=5)
    assert eta.eta_seconds(0) is None
    assert eta.samples_per_second(4) is None
    for seconds in (9.0, 9.0, 2.0, 2.0, 2.0, 2.0, 30.0):
        eta.step_took(seconds)
    assert eta.step_seconds == 2.0
    assert eta.eta_seconds(90) == 20.0
    assert eta.samples_per_second(4) == 2.0
    assert eta.eta_seconds(101) == 0.0
