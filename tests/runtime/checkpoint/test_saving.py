"""From a snapshot to a committed manifest: in this order, once, or not at all."""

import errno
import os
import secrets
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atelier_api.errors import CredentialsError, StoreError
from atelier_runtime.checkpoint.manifest import Manifest
from atelier_runtime.checkpoint.saving import StagingDiskFull, check_space
from atelier_runtime.store import LocalStore, Store
from atelier_runtime.store.protocol import sha256_of, sha256_of_file
from atelier_runtime.store.s3 import S3Store
from checkpoint_runs import TinyRun, state_of
from kills import KillingStore, acknowledge, acknowledged, die_in, in_fork, spread_pauses
from s3_fault_proxy import FaultProxy

pytest_plugins = ("store_fixtures",)


def test_a_committed_checkpoint_is_described_by_its_manifest(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    (tmp_path / "base" / "model_index.json").write_bytes(b"{}")
    run.save(10)
    outcome = run.try_save(20)
    report = outcome.report
    assert report is not None
    data = run.manifest(20).read_bytes()
    manifest = Manifest.decode(data)
    assert (report.step, report.manifest) == (20, "manifests/00000020-1.0.json")
    assert report.manifest_sha256 == sha256_of(data)
    assert report.size_bytes == manifest.size_bytes > 0
    assert report.time == manifest.time
    assert (manifest.step, manifest.previous_step, manifest.attempt) == (20, 10, "1.0")
    assert manifest.run == run.run_file.identity
    assert (manifest.world_size, manifest.strategy) == (1, "ddp")
    assert manifest.data.dataset_hash == "d" * 64
    assert manifest.base.files[0].sha256 == sha256_of(b"{}")
    assert set(manifest.versions) == {"atelier-training", "torch", "diffusers", "peft"}
    files = run.files(20)
    assert {file.path: file.sha256 for file in manifest.files} == {
        name: sha256_of_file(path) for name, path in files.items()
    }
    assert set(files) == {".metadata", "__0_0.distcp"}
    assert (run.root / manifest.folder / "records" / "0.json").read_text().count("\n") == 2


def test_the_manifest_is_written_after_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TinyRun.make(tmp_path).claim()
    order: list[str] = []
    for name in ("put_bytes", "put_file"):
        real = getattr(LocalStore, name)

        def record(self: LocalStore, key: str, *arguments: object, _real=real, **settings: object) -> object:  # type: ignore[no-untyped-def]
            order.append(key)
            return _real(self, key, *arguments, **settings)

        monkeypatch.setattr(LocalStore, name, record)
    run.save(10)
    assert order[-1] == "manifests/00000010-1.0.json"
    assert len(order) == 4


def test_staging_is_empty_after_a_save_and_after_a_failure(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.save(10)
    assert list(run.staging.iterdir()) == []
    (run.root / "checkpoints").rename(tmp_path / "elsewhere")
    (run.root / "checkpoints").write_bytes(b"in the way")
    outcome = run.try_save(20)
    assert outcome.report is None
    assert outcome.stage == "upload"
    assert isinstance(outcome.error, StoreError)
    assert list(run.staging.iterdir()) == []


def test_an_attempt_that_is_not_the_newest_does_not_commit(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()
    old = run.saver()
    run.claim()
    outcome = run.try_save(10, saver=old)
    assert outcome.report is None
    assert "attempt 1.0 gives way" in str(outcome.error)
    assert run.store.list("manifests/") == []


def test_a_newer_attempt_that_comes_during_the_commit_leaves_it_unacknowledged(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()

    class Overtaken:
        def __getattr__(self, name: str) -> object:
            return getattr(run.store, name)

        def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            if key.startswith("manifests/"):
                run.store.put_bytes("attempts/2.0.json", b"{}")
            return run.store.put_bytes(key, data, if_absent=if_absent)

    outcome = run.try_save(10, saver=run.saver(Overtaken()))  # type: ignore[arg-type]
    assert outcome.report is None


def test_of_two_writers_of_one_save_one_gives_way(any_store: Store, tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path, any_store).claim()
    run.save(10)
    kept = run.store.get_bytes("manifests/00000010-1.0.json")
    outcome = run.try_save(10)
    assert outcome.report is None
    assert "another writer has committed manifests/00000010-1.0.json" in str(outcome.error)
    assert run.store.get_bytes("manifests/00000010-1.0.json") == kept
    assert run.resumed().step == 10


def test_a_file_that_vanishes_before_the_commit_is_named(tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path).claim()

    class Forgetful:
        def __getattr__(self, name: str) -> object:
            return getattr(run.store, name)

        def list(self, prefix: str) -> object:
            return [info for info in run.store.list(prefix) if not info.key.endswith(".distcp")]

    outcome = run.try_save(10, saver=run.saver(Forgetful()))  # type: ignore[arg-type]
    assert "__0_0.distcp is missing" in str(outcome.error)
    assert run.store.list("manifests/") == []


_Space = namedtuple("_Space", "f_bavail f_frsize f_files f_favail")


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (_Space(1000, 1000, 0, 0), None),
        (_Space(1200, 1000, 10_000, 5_000), None),
        (_Space(999, 1000, 10_000, 5_000), "999000 bytes free, a checkpoint needs 1000000"),
        (_Space(1200, 1000, 10_000, 3), "3 more files"),
    ],
)
def test_the_disk_is_asked_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: _Space, word: str | None
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: space)
    if word is None:
        check_space(tmp_path, 833_333)
        return
    with pytest.raises(StagingDiskFull, match=rf"the disk of .* {word}") as caught:
        check_space(tmp_path, 833_334)
    assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["before", "while writing"])
def test_a_full_staging_disk_skips_the_save_and_the_next_one_works(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    run = TinyRun.make(tmp_path).claim()
    run.staging = small_disk / "staging"
    if not checked:
        monkeypatch.setattr("atelier_runtime.checkpoint.saving.check_space", lambda *_: None)
    ballast = small_disk / "ballast"
    ballast.write_bytes(secrets.token_bytes((2 << 20) - (16 << 10)))
    saver = run.saver()
    monkeypatch.setattr(saver, "_needed_bytes", lambda _: 40_000)
    outcome = run.try_save(10, saver=saver)
    assert outcome.report is None
    assert outcome.stage == "save"
    assert isinstance(outcome.error, StagingDiskFull)
    assert "disk" in str(outcome.error)
    ballast.unlink()
    run.save(20)
    assert run.resumed().step == 20


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_at_any_change_of_the_store_loses_nothing_that_was_acknowledged(tmp_path: Path, before: bool) -> None:
    """Every point of a save and of the collection after it, one by one."""
    killed = 0
    for nth in range(1, 100):
        run = TinyRun.make(tmp_path / str(nth), checkpoint={"keepLast": 1}).claim()
        run.save(10)
        acks = tmp_path / f"acks-{nth}"

        def work(run: TinyRun = run, acks: Path = acks, nth: int = nth) -> None:
            saver = run.saver(KillingStore(run.store, nth, before=before))  # type: ignore[arg-type]
            outcome = run.try_save(20, saver=saver)
            assert outcome.report is not None
            acknowledge(acks, 20)
            saver.collect_garbage()

        status = in_fork(work)
        assert status in (0, -9)
        point = run.resumed()
        assert point.refused == ()
        assert point.step >= max([10, *acknowledged(acks)])
        run.claim().save(30)
        run.saver().collect_garbage()
        assert [path.name[:8] for path in (run.root / "checkpoints").iterdir()] == ["00000030"]
        if status == 0:
            break
        killed += 1
    assert killed == 7  # two files, the records, the manifest; then manifest, files, unfinished uploads


def check_kills(make: Callable[[], TinyRun], acks: Path) -> None:
    """Kill a process that saves without pause, ten times, and resume after each.

    Eight lives end while they save: each times its first save and dies after a part, or up to three times, of as long.
    Two end somewhere between their start and their second save. So the load of the machine moves no kill out of a save.
    """
    run = make().claim()
    began = time.monotonic()
    run.save(1)
    once = time.monotonic() - began
    acknowledge(acks, 1)
    trained = 1

    def train(first: int, parts: float, *, at_once: bool) -> None:
        if at_once:
            die_in(parts * once)
        run = make().claim()  # with connections of its own
        saver = run.saver()
        for step in range(first, first + 1_000):
            began = time.monotonic()
            outcome = run.try_save(step, saver=saver)
            assert outcome.report is not None, outcome.error
            acknowledge(acks, step)
            saver.collect_garbage()
            if step == first and not at_once:
                die_in(parts * (time.monotonic() - began))

    gained = []
    for nth, parts in enumerate(spread_pauses(10, 3, seed=int.from_bytes(os.urandom(4), "big"))):
        at_once = nth in (3, 6)
        assert in_fork(lambda first=trained + 1: train(first, parts, at_once=at_once)) == -signal.SIGALRM  # type: ignore[misc]  # noqa: B023
        newest = max(acknowledged(acks))
        point = run.resumed()
        assert point.refused == ()
        # At most one checkpoint a life is committed and not yet acknowledged, but several lives in a row may have one.
        assert max(newest, trained) <= point.step <= max(newest, trained) + 1
        if not at_once:
            gained.append(point.step - trained)
        trained = point.step
    assert min(gained) == 1 < max(gained), "no kill came before, or none after, a commit"
    run.claim().save(trained + 1)
    run.saver().collect_garbage()
    kept = {key.partition("/")[0] for key in _keys(run, "checkpoints/")}
    assert len(kept) == len(_keys(run, "manifests/")) <= 3
    assert run.store.remove_unfinished(-2) <= 10


def _keys(run: TinyRun, prefix: str) -> list[str]:
    return [info.key.removeprefix(prefix) for info in run.store.list(prefix)]


@pytest.mark.processes
def test_ten_kills_at_random_moments_on_a_folder(tmp_path: Path) -> None:
    check_kills(lambda: TinyRun.make(tmp_path), tmp_path / "acks")


@pytest.mark.processes
def test_ten_kills_at_random_moments_on_s3(proxied_store: S3Store, tmp_path: Path) -> None:
    def make() -> TinyRun:
        return TinyRun.make(tmp_path, S3Store(proxied_store.uri, proxied_store.settings))

    check_kills(make, tmp_path / "acks")


@pytest.mark.processes
def test_lost_replies_commit_exactly_once(proxied_store: S3Store, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path, proxied_store).claim()
    s3_proxy.fault("lost_reply", method="PUT", match="manifests/")
    s3_proxy.fault("lost_reply", method="PUT", match=".metadata")
    s3_proxy.fault("lost_reply", method="PUT", match=".distcp")
    run.save(10)
    assert s3_proxy.broken == 3
    assert len(run.store.list("manifests/")) == 1
    assert run.resumed().step == 10


@pytest.mark.processes
def test_a_failing_store_costs_one_save_and_the_next_is_tried(
    proxied_store: S3Store, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    run = TinyRun.make(tmp_path, proxied_store).claim()
    run.save(10)
    s3_proxy.fault("status", method="PUT", match=".distcp", status=400, code="EntityTooLarge", times=1)
    outcome = run.try_save(20)
    assert outcome.report is None
    assert outcome.stage == "upload"
    assert "EntityTooLarge" in str(outcome.error)
    s3_proxy.fault("status", method="PUT", match=".distcp", status=403, code="AccessDenied", times=1)
    assert isinstance(run.try_save(30).error, CredentialsError)
    run.save(40)
    assert run.resumed().step == 40


@pytest.mark.processes
def test_bits_flipped_while_a_checkpoint_is_uploaded_do_no_harm(
    proxied_store: S3Store, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    run = TinyRun.make(tmp_path, proxied_store).claim()
    for match in (".distcp", ".metadata", "records/", "manifests/"):
        s3_proxy.fault("flip_req", method="PUT", match=match)
    run.save(10)
    assert s3_proxy.broken == 4
    point = run.resumed()
    assert (point.step, point.refused) == (10, ())


def test_states_of_different_steps_differ() -> None:
    assert not (state_of(1)["weights"]["block.0.weight"] == state_of(2)["weights"]["block.0.weight"]).any()
