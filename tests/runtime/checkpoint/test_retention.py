"""Which checkpoints stay, and what is removed around them."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from atelier_runtime.checkpoint.manifest import ManifestName
from atelier_runtime.checkpoint.retention import Collector, superfluous
from atelier_runtime.store import LocalStore
from checkpoint_runs import TinyRun


def collector(run: TinyRun, **settings: object) -> Collector:
    options = {"keep_last": 2, "keep_every": 0, "own_only": False} | settings
    return Collector(run.store, run.attempt, **options)  # type: ignore[arg-type]


def committed(run: TinyRun) -> list[int]:
    return [int(path.name[:8]) for path in sorted((run.root / "manifests").glob("*.json"))]


def folders(run: TinyRun) -> list[int]:
    return [int(path.name[:8]) for path in sorted((run.root / "checkpoints").iterdir())]


def age(folder: Path, hours: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - hours * 3600,) * 2)


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "gone"),
    [
        ([], 3, 0, []),
        ([10, 20, 30], 3, 0, []),
        ([10, 20, 30, 40], 3, 0, [10]),
        ([40, 10, 30, 20], 1, 0, [10, 20, 30]),
        ([0, 10, 20, 30, 40, 50], 2, 20, [0, 10, 30]),
        ([10, 20, 30], 1, 10, []),
        ([15, 25, 35], 1, 10, [15, 25]),
    ],
)
def test_the_newest_and_every_nth_stay(steps: list[int], keep_last: int, keep_every: int, gone: list[int]) -> None:
    names = [ManifestName(step, 1, 0) for step in steps]
    assert [name.step for name in superfluous(names, keep_last=keep_last, keep_every=keep_every)] == gone


def test_of_one_step_the_newer_attempt_counts_as_newer() -> None:
    names = [ManifestName(10, 2, 0), ManifestName(10, 1, 3), ManifestName(10, 10, 0)]
    assert superfluous(names, keep_last=1, keep_every=0) == [ManifestName(10, 1, 3), ManifestName(10, 2, 0)]


def test_superfluous_checkpoints_go_with_their_files(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10, 20, 30, 40)
    collector(run).collect()
    assert committed(run) == folders(run) == [30, 40]
    assert run.resumed().step == 40


def test_a_manifest_goes_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10, 20, 30)
    deleted: list[str] = []
    real = LocalStore.delete

    def delete(self: LocalStore, keys: Iterable[str]) -> None:
        keys = list(keys)
        deleted.extend(keys)
        real(self, keys)

    monkeypatch.setattr(LocalStore, "delete", delete)
    collector(run).collect()
    assert deleted[0] == "manifests/00000010-1.0.json"
    assert len(deleted) > 1
    assert all(key.startswith("checkpoints/00000010-1.0-") for key in deleted[1:])


def test_files_without_a_manifest_go_at_once_when_their_writer_is_dead(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10, 20)
    run.manifest(20).unlink()
    run.claim().save(15)
    assert run.attempt == "1.1"
    collector(run).collect()
    assert committed(run) == folders(run) == [10, 15]


def test_another_try_at_the_same_save_is_told_apart_by_the_manifest(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10)
    good = run.files(10)
    half = run.root / "checkpoints" / "00000010-1.0-00000000"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    collector(run).collect()
    assert not half.exists()
    assert all(path.exists() for path in good.values())


def test_files_of_a_quarantined_checkpoint_and_unknown_ones_stay_for_a_day(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10, 20)
    run.manifest(20).write_bytes(b"damaged")
    assert run.resumed().step == 10
    unknown = run.root / "checkpoints" / "something" / "else"
    unknown.parent.mkdir()
    unknown.write_bytes(b"x")
    collector(run).collect()
    assert run.files(20)
    assert unknown.exists()
    age(run.root / "checkpoints", hours=25)
    collector(run).collect()
    assert not unknown.exists()
    assert folders(run) == [10]


def test_a_newer_attempt_stops_the_collection_of_an_older_one(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10, 20, 30)
    old = collector(run)
    run.claim()
    assert old.collect() == 0
    assert committed(run) == [10, 20, 30]


def test_with_resume_never_other_attempts_are_left_alone(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(100, 200, 300)
    run.manifest(300).unlink()
    run.claim().save(10, 20, 30)
    collector(run, own_only=True).collect()
    assert committed(run) == [20, 30, 100, 200]
    assert folders(run) == [20, 30, 100, 200, 300]


def test_leftovers_of_killed_writers_go_after_a_day(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10)
    half = run.root / ".unfinished" / "half"
    half.write_bytes(b"x")
    collector(run).collect()
    assert half.exists()
    age(half.parent, hours=25)
    collector(run).collect()
    assert not half.exists()
