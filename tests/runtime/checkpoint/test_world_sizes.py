"""Checkpoints of several ranks, and resumes on another number of them."""

from pathlib import Path
from typing import Any

import pytest

from atelier_runtime.checkpoint.manifest import Manifest
from atelier_runtime.store import open_store
from checkpoint_runs import TinyRun, same
from processes import run_ranks
from s3_server import BUCKET, S3Server
from s3_settings import s3_settings

pytest_plugins = ("store_fixtures",)
pytestmark = pytest.mark.processes


@pytest.fixture(params=["folder", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> TinyRun:
    if request.param == "folder":
        return TinyRun.make(tmp_path)
    server: S3Server = request.getfixturevalue("s3_environment")
    run = TinyRun.make(tmp_path, uri=f"s3://{BUCKET}/world-sizes", s3=s3_settings(server).model_dump(by_alias=True))
    run.store = open_store(run.run_file.store_uri, run.run_file.spec.storage.s3)
    return run


def ranks(world: int, what: str, run: TinyRun, *arguments: Any) -> list[Any]:
    return run_ranks(world, f"checkpoint_ranks:{what}", run.run_file, run.staging, *arguments)


def test_two_ranks_one_rank_and_two_again_hold_the_same_bits(run: TinyRun) -> None:
    saved = ranks(2, "save_sharded", run, 10)[0]
    ((point, seen),) = ranks(1, "resume_sharded", run)
    assert (point.step, point.world_size, point.refused) == (10, 2, ())
    assert same(seen, saved)
    (changed,) = ranks(1, "save_sharded", run, 20, True)
    assert not same(changed["weights"], saved["weights"])
    assert same(changed["optimizer"], saved["optimizer"])
    for point, seen in ranks(2, "resume_sharded", run):
        assert (point.step, point.world_size) == (20, 1)
        assert same(seen, changed)


@pytest.mark.parametrize("run", ["folder"], indirect=True)
def test_three_ranks_and_nodes_of_one_rank_each_hold_the_same_bits(run: TinyRun) -> None:
    saved = ranks(2, "save_sharded", run, 10)[0]
    for _, seen in ranks(3, "resume_sharded", run):
        assert same(seen, saved)
    results = run_ranks(2, "checkpoint_ranks:resume_apart", run.run_file, run.staging)
    for _, seen in results:
        assert same(seen, saved)


@pytest.mark.parametrize("run", ["folder"], indirect=True)
def test_every_rank_writes_its_own_files_and_shares_out_what_is_whole(run: TinyRun) -> None:
    ranks(2, "save_sharded", run, 10)
    manifest = Manifest.decode(run.manifest(10).read_bytes())
    assert {file.path for file in manifest.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert manifest.world_size == 2
    assert {path.name for path in (run.root / manifest.folder / "records").iterdir()} == {"0.json", "1.json"}


@pytest.mark.parametrize("run", ["folder"], indirect=True)
def test_damage_that_one_rank_sees_makes_all_ranks_move_on(run: TinyRun) -> None:
    older = ranks(2, "save_sharded", run, 10)[0]
    ranks(2, "save_sharded", run, 20)
    for point, seen in ranks(2, "resume_with_damage_seen_by_one", run):
        assert point.step == 10
        assert ".distcp" in point.refused[0].reason
        assert same(seen, older)


@pytest.mark.parametrize("run", ["folder"], indirect=True)
def test_ranks_that_save_at_their_own_pace_commit_the_same_steps(run: TinyRun) -> None:
    first, second = ranks(2, "save_in_disorder", run, 30)
    assert first == second
    assert first[-1] == 30
    assert first == sorted(first)


@pytest.mark.parametrize("run", ["folder"], indirect=True)
def test_a_lost_writer_ends_the_training_on_all_ranks(run: TinyRun) -> None:
    first, second = ranks(2, "lose_a_writer", run)
    assert "checkpoint writer" in first
    assert "the checkpoint writer process is gone, exit code -9" in second


@pytest.mark.parametrize("run", ["s3"], indirect=True)
def test_refused_credentials_are_raised_on_all_ranks(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for error in ranks(2, "without_credentials", run):
        assert error.startswith("CredentialsError: ")
