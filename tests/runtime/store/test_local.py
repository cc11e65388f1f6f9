"""A folder as a store: atomic, durable, clear about what is wrong."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from atelier_api.errors import ConfigError, StoreError
from atelier_runtime.store import CorruptObject, LocalStore
from atelier_runtime.store import local as local_module
from atelier_runtime.store.protocol import sha256_of


def test_opening_makes_no_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert store.list("") == []
    assert not (tmp_path / "store").exists()


def test_a_reader_never_sees_half_an_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    bodies = [bytes([index]) * 200_000 for index in range(2)]
    store.put_bytes("a", bodies[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for body in bodies:
                store.put_bytes("a", body)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert store.get_bytes("a") in bodies
    finally:
        stop.set()
        writer.join()


def test_an_object_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"rename {target}")
        real_replace(self, target)
        return target

    monkeypatch.setattr(local_module.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    LocalStore(tmp_path).put_bytes("a/b", b"x")
    rename = events.index(f"rename {tmp_path / 'a' / 'b'}")
    assert any("/.unfinished/" in event for event in events[:rename])
    assert events[rename + 1 :] == [f"sync {tmp_path / 'a'}"]
    assert f"sync {tmp_path}" in events[:rename]  # the new folder's own name


def test_without_hard_links_one_writer_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(local_module.os, "link", refuse)
    store = LocalStore(tmp_path)
    assert store.put_bytes("a", b"mine", if_absent=True)
    assert not store.put_bytes("a", b"other", if_absent=True)
    assert store.get_bytes("a") == b"mine"
    store.get_file("a", tmp_path / "copy", link=True)
    assert (tmp_path / "copy").read_bytes() == b"mine"


def test_a_linked_file_is_the_stored_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put_bytes("a", b"content")
    store.get_file("a", tmp_path / "in", sha256=sha256_of(b"content"), link=True)
    assert (tmp_path / "in").stat().st_ino == (tmp_path / "store" / "a").stat().st_ino


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"changed")
    store = LocalStore(tmp_path / "store")
    with pytest.raises(CorruptObject, match="changed while it was copied"):
        store.put_file("a", tmp_path / "out", sha256_of(b"original"))
    assert store.list("") == []


def test_leftovers_of_killed_writers_are_no_objects_and_are_removed_by_age(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("a", b"x")
    old, new = tmp_path / ".unfinished" / "old", tmp_path / ".unfinished" / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 100, time.time() - 100))
    assert [info.key for info in store.list("")] == ["a"]
    assert store.remove_unfinished(50) == 1
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_module.os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full"):
        LocalStore(tmp_path).put_bytes("a", b"x")
    monkeypatch.undo()
    assert LocalStore(tmp_path).list("") == []


def test_a_folder_without_access_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"give this user access to spec\.storage\.uri"):
        LocalStore(tmp_path / "store").put_bytes("a", b"x")


def test_a_copy_tells_its_bytes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put_bytes("a", b"four")
    told: list[int] = []
    store.get_file("a", tmp_path / "back", progress=told.append)
    assert told == [4]
