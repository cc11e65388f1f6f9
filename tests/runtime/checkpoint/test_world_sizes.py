"""Checkpoints of several ranks, and resumes on another number of them."""

from pathlib import Path
from typing import Any

import pytest

from atelier_runtime.checkpoint.manifest import Manifest
from checkpoint_runs import TinyRun, same
from processes import run_ranks
from s3_server import BUCKET, S3Server
from s3_settings import s3_settings

pytest_plugins = ("store_fixtures",)
pytestmark = pytest.mark.processes


def ranks(world: int, what: str, run: TinyRun) -> list[Any]:
    return run_ranks(world, f"checkpoint_ranks:{what}", run.run_file, run.staging)


def test_two_ranks_one_and_two_again_hold_the_same_bits(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path)
    ten, twenty = ranks(2, "save_twice", run)[0]
    manifest = Manifest.decode(run.manifest(20).read_bytes())
    assert {file.path for file in manifest.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert (manifest.world_size, manifest.previous_step) == (2, 10)
    assert {path.name for path in (run.root / manifest.folder / "records").iterdir()} == {"0.json", "1.json"}

    ((point, seen, changed),) = ranks(1, "change", run)
    assert (point.step, point.world_size, point.refused) == (20, 2, ())
    assert same(seen, twenty)
    assert not same(seen, ten)
    assert not same(changed["weights"], twenty["weights"])
    assert same(changed["optimizer"], twenty["optimizer"])

    for point, seen in ranks(3, "resume_together", run):
        assert (point.step, point.world_size) == (30, 1)
        assert same(seen, changed)

    for together, apart, after_damage in ranks(2, "resume_in_three_ways", run):
        for point, seen in (together, apart):
            assert (point.step, point.world_size) == (30, 1)
            assert same(seen, changed)
        point, seen = after_damage
        assert point.step == 20
        assert point.refused[0].manifest == "manifests/00000030-1.1.json"
        assert ".distcp" in point.refused[0].reason
        assert same(seen, twenty)


def test_two_ranks_save_to_s3_and_three_resume_from_it(s3_environment: S3Server, tmp_path: Path) -> None:
    s3 = s3_settings(s3_environment).model_dump(by_alias=True)
    run = TinyRun.make(tmp_path, uri=f"s3://{BUCKET}/world-sizes", s3=s3)
    _, twenty = ranks(2, "save_twice", run)[0]
    for point, seen in ranks(3, "resume_together", run):
        assert point.step == 20
        assert same(seen, twenty)


def test_ranks_that_save_at_their_own_pace_commit_the_same_steps(tmp_path: Path) -> None:
    first, second = ranks(2, "save_in_disorder", TinyRun.make(tmp_path))
    assert first == second
    assert first[-1] == 30
    assert first == sorted(first)


def test_a_lost_writer_ends_the_training_on_all_ranks(tmp_path: Path) -> None:
    first, second = ranks(2, "lose_a_writer", TinyRun.make(tmp_path))
    assert "checkpoint writer" in first
    assert "the checkpoint writer process is gone, exit code -9" in second


def test_refused_credentials_are_raised_on_all_ranks(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3 = s3_settings(s3_environment).model_dump(by_alias=True)
    for error in ranks(2, "without_credentials", TinyRun.make(tmp_path, uri=f"s3://{BUCKET}/refused", s3=s3)):
        assert error.startswith("CredentialsError: ")
