"""What every store does: a folder, a real S3 server in plain, and one with TLS."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.store import CorruptObject, ObjectMissing, Store, open_store, probe
from atelier_runtime.store.protocol import sha256_of

pytest_plugins = ("store_fixtures",)

MIB = 1 << 20


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return sha256_of(data)


def test_bytes_come_back_as_they_were_written(any_store: Store) -> None:
    data = secrets.token_bytes(100_000)
    assert any_store.put_bytes("a/b.bin", data)
    assert any_store.get_bytes("a/b.bin") == data


def test_a_second_write_replaces_the_first(any_store: Store) -> None:
    any_store.put_bytes("run.json", b"first")
    any_store.put_bytes("run.json", b"second")
    assert any_store.get_bytes("run.json") == b"second"


def test_if_absent_writes_once_and_says_whether_the_bytes_are_ours(any_store: Store) -> None:
    assert any_store.put_bytes("manifests/1.json", b"mine", if_absent=True)
    assert any_store.put_bytes("manifests/1.json", b"mine", if_absent=True)
    assert not any_store.put_bytes("manifests/1.json", b"other", if_absent=True)
    assert any_store.get_bytes("manifests/1.json") == b"mine"


def test_of_many_writers_of_one_key_exactly_one_wins(any_store: Store) -> None:
    bodies = [f"writer {index}".encode() for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda body: any_store.put_bytes("manifests/1.json", body, if_absent=True), bodies))
    assert won.count(True) == 1
    assert any_store.get_bytes("manifests/1.json") == bodies[won.index(True)]


@pytest.mark.parametrize("size", [0, 1, 3 * MIB, 16 * MIB, 40 * MIB + 7])
def test_files_come_back_as_they_were_written(any_store: Store, tmp_path: Path, size: int) -> None:
    data = secrets.token_bytes(min(size, MIB)) * (size // MIB + 1)
    digest = write(tmp_path / "out", data[:size])
    any_store.put_file("checkpoints/x/__0_0.distcp", tmp_path / "out", digest)
    any_store.get_file("checkpoints/x/__0_0.distcp", tmp_path / "in", sha256=digest)
    assert sha256_of((tmp_path / "in").read_bytes()) == digest
    assert (tmp_path / "out").exists()
    info = any_store.head("checkpoints/x/__0_0.distcp")
    assert info is not None
    assert info.size == size


def test_moving_a_file_leaves_nothing_behind(any_store: Store, tmp_path: Path) -> None:
    digest = write(tmp_path / "out", b"content")
    any_store.put_file("a", tmp_path / "out", digest, move=True)
    assert not (tmp_path / "out").exists()
    assert any_store.get_bytes("a") == b"content"


def test_a_wrong_hash_refuses_the_file_and_leaves_nothing(any_store: Store, tmp_path: Path) -> None:
    any_store.put_bytes("a", b"content")
    with pytest.raises(CorruptObject, match="a"):
        any_store.get_file("a", tmp_path / "in", sha256=sha256_of(b"other"))
    assert list(tmp_path.glob("*in*")) == []


def test_a_missing_object_has_its_own_error(any_store: Store, tmp_path: Path) -> None:
    assert any_store.head("nothing") is None
    with pytest.raises(ObjectMissing):
        any_store.get_bytes("nothing")
    with pytest.raises(ObjectMissing):
        any_store.get_file("nothing", tmp_path / "in")
    any_store.delete(["nothing"])


def test_listing_is_by_prefix_and_sorted(any_store: Store) -> None:
    for key in ("manifests/2.json", "manifests/bad/1.json", "manifests/1.json", "manifest", "checkpoints/1/.metadata"):
        any_store.put_bytes(key, key.encode())
    assert [info.key for info in any_store.list("manifests/")] == [
        "manifests/1.json",
        "manifests/2.json",
        "manifests/bad/1.json",
    ]
    assert [info.size for info in any_store.list("checkpoints/1")] == [len("checkpoints/1/.metadata")]
    assert [info.key for info in any_store.list("manifests/1")] == ["manifests/1.json"]
    assert any_store.list("nothing/") == []
    assert len(any_store.list("")) == 5


def test_deleted_objects_are_gone(any_store: Store) -> None:
    keys = [f"checkpoints/{index:02d}/file" for index in range(20)]
    for key in keys:
        any_store.put_bytes(key, b"x")
    any_store.delete(keys[1:])
    assert [info.key for info in any_store.list("")] == keys[:1]


def test_times_are_the_stores_own(any_store: Store) -> None:
    any_store.put_bytes("a", b"x")
    info = any_store.head("a")
    assert info is not None
    assert abs(any_store.now() - info.modified) < timedelta(seconds=30)
    assert abs(any_store.now() - datetime.now(UTC)) < timedelta(seconds=30)


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", "a/", "./a"])
def test_keys_cannot_leave_the_store(any_store: Store, key: str) -> None:
    with pytest.raises(ConfigError, match="object key"):
        any_store.put_bytes(key, b"x")


def test_the_probe_finds_what_the_store_can_do_and_cleans_up(any_store: Store) -> None:
    found = probe(any_store)
    assert found.conditional_write == "enforced"
    assert found.payload_check == "yes"
    assert found.list_after_write == "yes"
    assert any_store.list("") == []


def test_other_schemes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"spec\.storage\.uri is 'gs://bucket'"):
        open_store("gs://bucket", S3Settings())
