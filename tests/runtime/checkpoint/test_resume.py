"""The newest checkpoint that verifies, and nothing else, whatever has happened to the others."""

import pickle
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_api.errors import ConfigError, StoreError
from atelier_runtime.checkpoint import resume
from atelier_runtime.checkpoint.manifest import Manifest
from atelier_runtime.store import LocalStore, Store
from atelier_runtime.store.retry import RetryPolicy
from atelier_runtime.store.s3 import S3Store
from checkpoint_runs import OneRank, TinyRun, blank_state, same, state_of
from s3_fault_proxy import FaultProxy
from s3_server import S3Server

pytest_plugins = ("store_fixtures",)

Damage = Callable[[Path], None]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(data))


def cut(to: Callable[[int], int]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: to(path.stat().st_size)])

    return damage


DAMAGES: dict[str, Damage] = {
    "flipped bit": flip,
    "missing": Path.unlink,
    "empty": cut(lambda _: 0),
    "half": cut(lambda size: size // 2),
    "last byte gone": cut(lambda size: size - 1),
    "last 64 bytes gone": cut(lambda size: size - 64),
}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    """A run with checkpoints of steps 10 and 20."""
    run = TinyRun.make(tmp_path).claim()
    run.save(10, 20)
    return run


def test_the_newest_is_loaded(any_store: Store, tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path, any_store).claim()
    run.save(10, 30, 20)
    point = run.resumed()
    assert (point.step, point.manifest, point.refused) == (30, "manifests/00000030-1.0.json", ())


def test_nothing_is_left_in_staging(run: TinyRun) -> None:
    run.resumed()
    assert list(run.staging.iterdir()) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(run: TinyRun, name: str, damage: Damage) -> None:
    damage(run.files(20)[name])
    point = run.resumed()
    assert point.step == 10
    (refusal,) = point.refused
    assert refusal.manifest == "manifests/00000020-1.0.json"
    assert name in refusal.reason
    assert not run.store.head("manifests/00000020-1.0.json")
    assert run.store.head("manifests/bad/00000020-1.0.json")
    assert run.resumed().refused == ()  # it is not tried again


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_manifest_is_refused_and_the_checkpoint_before_is_used(run: TinyRun, damage: Damage) -> None:
    damage(run.manifest(20))
    point = run.resumed()
    assert point.step == 10
    if damage is not Path.unlink:  # without its manifest there is no checkpoint to refuse
        assert "the manifest cannot be used" in point.refused[0].reason


def test_two_hundred_flipped_bits_are_all_noticed(run: TinyRun) -> None:
    """One after the other, anywhere in the newest checkpoint's files and its manifest."""
    paths = [*run.files(20).values(), run.manifest(20)]
    kept = {path: path.read_bytes() for path in paths}
    sizes = [len(kept[path]) for path in paths]
    draws = random.Random(0)
    for _ in range(200):
        (path,) = draws.choices(paths, sizes)
        position, bit = draws.randrange(len(kept[path])), draws.randrange(8)
        data = bytearray(kept[path])
        data[position] ^= 1 << bit
        path.write_bytes(bytes(data))
        assert run.resumed().step == 10, f"bit {bit} of byte {position} of {path.name}"
        for damaged, data_before in kept.items():
            damaged.parent.mkdir(parents=True, exist_ok=True)
            damaged.write_bytes(data_before)
    assert run.resumed().step == 20


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_crafted_pickle_is_never_executed(run: TinyRun, tmp_path: Path, name: str) -> None:
    path = run.files(20)[name]
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    path.write_bytes(bomb + secrets.token_bytes(path.stat().st_size - len(bomb)))  # of the right size
    assert run.resumed().step == 10
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it was live


def test_what_will_be_unpickled_is_copied_before_it_is_verified(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    linked: dict[str, bool] = {}
    real = LocalStore.get_file

    def get_file(self: LocalStore, key: str, path: Path, *, sha256: str | None = None, link: bool = False) -> None:
        linked[path.name] = link
        real(self, key, path, sha256=sha256, link=link)

    monkeypatch.setattr(LocalStore, "get_file", get_file)
    run.resumed()
    assert linked == {".metadata": False, "__0_0.distcp": True}


def test_files_that_no_manifest_speaks_for_are_not_looked_at(run: TinyRun, tmp_path: Path) -> None:
    run.save(30)
    run.manifest(30).unlink()
    (run.files(30)[".metadata"]).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert run.resumed().step == 20
    assert not (tmp_path / "exploded").exists()


def test_of_two_manifests_of_one_step_the_newer_attempt_wins(run: TinyRun) -> None:
    run.claim().save(20)
    assert run.attempt == "1.1"
    assert run.resumed().manifest == "manifests/00000020-1.1.json"


def test_a_manifest_of_another_run_is_refused_by_name(run: TinyRun, tmp_path: Path) -> None:
    other = TinyRun.make(tmp_path / "other")
    identity = other.run_file.identity.model_copy(update={"uid": "another"})
    other.run_file = other.run_file.model_copy(update={"identity": identity})
    other.save(30)
    for path in other.root.rglob("00000030-*"):
        target = run.root / path.relative_to(other.root)
        path.rename(target)
    point = run.resumed()
    assert point.step == 20
    assert "of another run, default/demo-another; this one is default/demo-local" in point.refused[0].reason


def test_a_manifest_under_another_name_is_refused(run: TinyRun) -> None:
    run.manifest(10).rename(run.root / "manifests" / "00000090-1.0.json")
    point = run.resumed()
    assert point.step == 20
    assert point.refused[0].reason == "the manifest is of 00000010-1.0.json"


def test_a_run_without_checkpoints_starts_from_step_0(any_store: Store, tmp_path: Path) -> None:
    run = TinyRun.make(tmp_path, any_store).claim()
    state = blank_state()
    assert run.resume(state) is None
    assert same(state, blank_state())


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_step_0(run: TinyRun) -> None:
    for step in (10, 20):
        flip(run.files(step)["__0_0.distcp"])
    for _ in range(2):  # nor at the next start
        state = blank_state()
        with pytest.raises(
            ConfigError, match=r"no checkpoint of the run in .* verifies, and manifests/bad/ holds those"
        ):
            run.resume(state)
        assert same(state, blank_state())
    for path in (run.root / "manifests" / "bad").iterdir():
        path.unlink()
    assert run.resume(blank_state()) is None


def test_the_refusals_are_named_when_nothing_is_left(run: TinyRun) -> None:
    flip(run.manifest(10))
    run.files(20)["__0_0.distcp"].unlink()
    with pytest.raises(
        ConfigError, match=r"00000020-1\.0\.json: __0_0\.distcp is missing; .*00000010-1\.0\.json: the man"
    ):
        run.resume(blank_state())


def test_with_mode_never_nothing_is_looked_at(run: TinyRun, tmp_path: Path) -> None:
    never = TinyRun.make(tmp_path, run.store, resume={"mode": "Never"})
    assert resume(never.run_file, OneRank(), object(), blank_state(), never.staging) is None  # type: ignore[arg-type]


def change(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split("/")
    place = state
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("weights/block.0.weight", torch.zeros(7), "Size mismatch between saved .* for weights.block.0.weight"),
        ("weights/block.0.weight", None, r"has also weights.block.0.weight \(1 entries\)"),
        ("weights/block.9.weight", torch.zeros(7), r"has no weights.block.9.weight \(1 entries\)"),
        ("weights/block.0.weight", torch.zeros(1000).bfloat16(), "weights.block.0.weight as torch.float32, the run as"),
        ("step", torch.zeros(1), "holds step as None, the run as torch.float32"),
    ],
)
def test_a_checkpoint_of_other_settings_is_explained_and_kept(
    run: TinyRun, path: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"the newest checkpoint .*{message}.*spec.storage.resume.mode"):
        run.resume(change(blank_state(), path, value))
    assert run.store.head("manifests/00000020-1.0.json")


def test_a_newer_schema_is_explained_and_kept(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atelier_runtime.checkpoint.manifest.SCHEMA_VERSION", 0)
    with pytest.raises(ConfigError, match="its schemaVersion is 1, this version reads up to 0; use a newer version"):
        run.resume(blank_state())
    assert run.store.head("manifests/00000020-1.0.json")


def test_a_full_disk_is_no_damage(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStore, "get_file", full)
    with pytest.raises(StoreError, match="cannot write to the disk of"):
        run.resume(blank_state())
    assert run.store.head("manifests/00000020-1.0.json")


def test_the_pick_among_ten_thousand_manifests_reads_only_one(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.root / "manifests"
    for step in range(10_000):
        (folder / f"{step:08d}-0.0.json").touch()
    run.save(10_000)
    read: list[str] = []
    real = LocalStore.get_bytes
    monkeypatch.setattr(LocalStore, "get_bytes", lambda self, key: (read.append(key), real(self, key))[1])
    assert run.resumed().step == 10_000
    assert read == ["manifests/00010000-1.0.json"]


@pytest.mark.processes
def test_bits_flipped_on_the_way_from_the_store_do_no_harm(
    proxied_store: S3Store, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    run = TinyRun.make(tmp_path, proxied_store).claim()
    run.save(10, 20)
    for match in ("manifests/0", ".metadata", ".distcp"):
        s3_proxy.fault("flip_resp", method="GET", match=match)
    point = run.resumed()
    assert s3_proxy.broken == 3
    assert (point.step, point.refused) == (20, ())


@pytest.mark.processes
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_bits_flipped_in_the_store_are_refused_by_name(
    proxied_store: S3Store, s3_environment: S3Server, tmp_path: Path, name: str
) -> None:
    run = TinyRun.make(tmp_path, proxied_store).claim()
    run.save(10, 20)
    manifest = Manifest.decode(run.store.get_bytes("manifests/00000020-1.0.json"))
    flip(s3_environment.folder / proxied_store.full_key(manifest.folder + name))
    point = run.resumed()
    assert point.step == 10
    assert name in point.refused[0].reason


@pytest.mark.processes
@pytest.mark.parametrize("match", ["prefix", "manifests/0", ".metadata", ".distcp"])
def test_a_store_that_does_not_answer_is_no_damage(
    proxied_store: S3Store, s3_proxy: FaultProxy, tmp_path: Path, match: str
) -> None:
    run = TinyRun.make(tmp_path, proxied_store).claim()
    run.save(10, 20)
    run.store = S3Store(proxied_store.uri, proxied_store.settings, retry=RetryPolicy(attempts=1))
    rule = s3_proxy.fault("status", method="GET", match=match, times=10_000, status=400, code="InternalTrouble")
    with pytest.raises(StoreError, match="InternalTrouble"):
        run.resume(blank_state())
    rule.times = 0
    assert run.store.list("manifests/bad/") == []
    assert run.resumed().step == 20


def test_the_state_that_is_filled_was_another_one() -> None:
    assert not same(blank_state(), state_of(0))
