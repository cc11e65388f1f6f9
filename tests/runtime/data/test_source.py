import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from atelier_api.errors import DataError, StoreError
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.data import source as source_module
from atelier_runtime.data.collective import Share
from atelier_runtime.data.source import CLIPS, PICTURES, SOUNDS, RemoteCopy, list_folder, list_objects
from atelier_runtime.store import LocalStore, ObjectInfo


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def names(root: Path, extensions: tuple[str, ...] = PICTURES) -> list[str]:
    return [found.name for found in list_folder(0, str(root), extensions)]


def test_folders_are_read_whole_in_the_order_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "b/10.JPG", "a.webp", "c/d/e.gif", "z.tiff", "y.bmp", "x.jpeg", "notes.md", "b/2.txt")
    assert names(tmp_path) == ["a.webp", "b/10.JPG", "b/2.png", "c/d/e.gif", "x.jpeg", "y.bmp", "z.tiff"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, ".a.png", ".thumbs/b.png", "c/.d/e.png", "f.png")
    assert names(tmp_path) == ["f.png"]


def test_pictures_and_clips_are_told_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.mp4", "c.mov", "d.mkv", "e.webm", "f.avi", "g.MP4")
    assert names(tmp_path) == ["a.png"]
    assert names(tmp_path, CLIPS) == ["b.mp4", "c.mov", "d.mkv", "e.webm", "f.avi", "g.MP4"]


def test_sounds_are_paired_with_their_lyrics_and_others_have_none(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.wav", "a.txt", "a.lyrics.txt", "b.FLAC", "c.mp3", "c.lyrics.txt", "d.ogg", "e.png", "e.lyrics.txt"
    )
    found = {item.name: item for item in list_folder(0, str(tmp_path), SOUNDS)}
    beside = {
        name: tuple(file and Path(file.path).name for file in (item.caption, item.lyrics))
        for name, item in found.items()
    }
    assert beside == {
        "a.wav": ("a.txt", "a.lyrics.txt"),
        "b.FLAC": (None, None),
        "c.mp3": (None, "c.lyrics.txt"),
        "d.ogg": (None, None),
    }
    [picture] = list_folder(0, str(tmp_path), PICTURES)
    assert picture.lyrics is None


def test_captions_are_paired_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.txt", "b.png", "sub/a.b.png", "sub/a.b.txt")
    found = {item.name: item for item in list_folder(0, str(tmp_path), PICTURES)}
    assert found["a.png"].caption is not None
    assert found["a.png"].caption.path == str(tmp_path / "a.txt")
    assert found["b.png"].caption is None
    assert found["sub/a.b.png"].caption is not None


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.png", "elsewhere/b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == ["a.png", "linked/b.png"]


def test_a_dead_link_is_listed_and_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere.png")
    [found] = list_folder(0, str(tmp_path), PICTURES)
    assert found.file.size == -1


def test_a_missing_folder_is_refused_with_its_place_in_the_spec(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"spec\.data\.sources\[3\]\.uri is '.*nowhere'; no such folder"):
        list_folder(3, str(tmp_path / "nowhere"), PICTURES)


class Bucket:
    """A remote prefix: a local store that counts what is fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder)
        self.fetched: list[str] = []

    def list(self, prefix: str) -> list[ObjectInfo]:
        return list(self.store.list(prefix))

    def get_file(self, key: str, path: Path) -> None:
        self.fetched.append(key)
        self.store.get_file(key, path)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    touch(tmp_path / "remote", "a.png", "a.txt", "sub/b.png", "notes.md", ".hidden/c.png")
    bucket = Bucket(tmp_path / "remote")
    monkeypatch.setattr(source_module, "open_store", lambda uri, s3: bucket)
    return bucket


URI = "s3://bucket/prefix"


ALONE = Share(0, 1)


def copy(tmp_path: Path, share: Share = ALONE) -> RemoteCopy:
    remote = RemoteCopy(URI, S3Settings(), list_objects(URI, S3Settings(), PICTURES), tmp_path / "cache")
    remote.fetch(remote.missing(share))
    return remote


def test_a_remote_prefix_is_fetched_once_with_its_captions(tmp_path: Path, bucket: Bucket) -> None:
    found = copy(tmp_path).found(2, PICTURES)
    assert [(item.source, item.name) for item in found] == [(2, "a.png"), (2, "sub/b.png")]
    assert Path(found[0].file.path).read_text() == "a.png"
    assert found[0].caption is not None
    assert Path(found[0].caption.path).read_text() == "a.txt"
    assert sorted(bucket.fetched) == ["a.png", "a.txt", "sub/b.png"]
    assert copy(tmp_path).found(2, PICTURES) == found
    assert len(bucket.fetched) == 3


def test_only_a_replaced_object_is_fetched_again(tmp_path: Path, bucket: Bucket) -> None:
    copy(tmp_path)
    changed = tmp_path / "remote" / "a.png"
    changed.write_text("other")  # as long as before: only the time tells
    later = datetime.fromtimestamp(changed.stat().st_mtime) + timedelta(seconds=5)
    os.utime(changed, (later.timestamp(), later.timestamp()))
    bucket.fetched.clear()
    found = copy(tmp_path).found(0, PICTURES)
    assert bucket.fetched == ["a.png"]
    assert Path(found[0].file.path).read_text() == "other"


def test_ranks_that_share_a_cache_divide_the_objects(tmp_path: Path, bucket: Bucket) -> None:
    copy(tmp_path, Share(0, 2))
    first = set(bucket.fetched)
    copy(tmp_path, Share(1, 2))
    assert len(bucket.fetched) == 3
    assert 0 < len(first) < 3


def test_an_object_that_grows_meanwhile_is_an_error_and_not_kept(tmp_path: Path, bucket: Bucket) -> None:
    objects = list_objects(URI, S3Settings(), PICTURES)
    remote = RemoteCopy(URI, S3Settings(), objects, tmp_path / "cache")
    (tmp_path / "remote" / "a.png").write_text("longer than it was")
    with pytest.raises(StoreError, match=r"a\.png arrived with another size"):
        remote.fetch(objects[:1])
    assert objects[0] in remote.missing(ALONE)
