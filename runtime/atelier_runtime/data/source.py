"""Where samples lie: a folder or an S3 prefix, listed in a fixed order together with the captions and lyrics beside the files.

A prefix is copied once into the cache. The local name of an object contains its key, size and time, so an object that was
replaced is fetched again and everything else is not.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from atelier_api.errors import DataError, StoreError
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.data.collective import Share
from atelier_runtime.store import ObjectInfo, open_store

log = logging.getLogger(__name__)

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "tiff", "tif", "gif")
CLIPS = ("mp4", "mov", "mkv", "webm", "avi")
SOUNDS = ("wav", "flac", "mp3", "ogg")
_TRANSFERS = 8


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file and the marks by which a change of it is noticed. `size` is -1 where it cannot be looked at (a dead link)."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> "FileFacts":
        try:
            stat = os.stat(path)
        except OSError:
            return cls(path, -1, 0)
        return cls(path, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Found:
    """A picture, clip or sound of a source. `name` is its path below the source, with forward slashes.

    `lyrics` is what a sound has beside its caption. `beside` has an entry for each of the source's places of pictures beside its
    samples, by the field that names it: the file there, or why there is none.
    """

    source: int
    name: str
    file: FileFacts
    caption: FileFacts | None
    beside: Mapping[str, FileFacts | str] = field(default_factory=dict)
    lyrics: FileFacts | None = None


def is_remote(uri: str) -> bool:
    """Whether a source has to be copied to this machine first."""
    return uri.startswith("s3://")


def list_folder(source: int, uri: str, extensions: Sequence[str]) -> list[Found]:
    """The samples below a folder, sorted by name. Hidden files and folders are skipped, links are followed.

    Raises DataError where there is no such folder.
    """
    return _paired(source, folder_paths(f"spec.data.sources[{source}].uri", uri), extensions)


def folder_paths(field: str, uri: str) -> dict[str, Path]:
    """The files below a folder by name. Raises DataError, about the `field` that names it, where there is no such folder."""
    root = Path(uri)
    if not root.is_dir():
        raise DataError(
            f"{field} is {uri!r}; no such folder is there; give a folder of pictures, clips or sounds, or s3://bucket/prefix"
        )
    return {name: root / name for name in _walk(root)}


def with_pictures(samples: Sequence[Found], places: Mapping[str, Mapping[str, Path]]) -> list[Found]:
    """The samples with the picture of the same name, but for its ending, from each of the places (files by name), by field."""
    tables = {field: _pictures_by_stem(paths) for field, paths in places.items()}
    return [
        replace(sample, beside={field: _companion(sample, table, field) for field, table in tables.items()})
        for sample in samples
    ]


def list_objects(uri: str, s3: S3Settings, extensions: Sequence[str]) -> list[ObjectInfo]:
    """The samples and captions below an S3 prefix, by key. Hidden ones are skipped."""
    wanted = (*extensions, "txt")
    infos = [
        info for info in open_store(uri, s3).list("") if not _is_hidden(info.key) and _extension(info.key) in wanted
    ]
    return sorted(infos, key=lambda info: info.key)


class RemoteCopy:
    """The copy of an S3 prefix in the cache."""

    def __init__(self, uri: str, s3: S3Settings, objects: Sequence[ObjectInfo], cache: Path) -> None:
        self._store = open_store(uri, s3)
        self._objects = objects
        folder = cache / "downloads" / hashlib.sha256(uri.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {info.key: folder / _local_name(info) for info in objects}

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where each object is or will be, by its key below the prefix."""
        return self._paths

    def missing(self, share: Share) -> list[ObjectInfo]:
        """Objects that are not here and that this rank has to fetch."""
        own = self._objects[share.index :: share.count]
        return [info for info in own if not _is_here(self._paths[info.key], info.size)]

    def fetch(self, objects: Sequence[ObjectInfo]) -> int:
        """Copy these objects into the cache, several at a time. Gives how many there were."""
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(self._fetch_one, objects))
        return len(objects)

    def found(self, source: int, extensions: Sequence[str]) -> list[Found]:
        """The samples, sorted by name, once every object is here."""
        return _paired(source, self._paths, extensions)

    def _fetch_one(self, info: ObjectInfo) -> None:
        target = self._paths[info.key]
        self._store.get_file(info.key, target)
        if not _is_here(target, info.size):
            target.unlink(missing_ok=True)
            raise StoreError(
                f"{info.key} arrived with another size than the {info.size} bytes it was listed with; it is being written to"
            )


def _is_here(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _local_name(info: ObjectInfo) -> str:
    """Another one for another content. By the time only where the store has no mark: S3's clock counts whole seconds."""
    marks = f"{info.key}\n{info.size}\n{info.etag or info.modified}"
    return hashlib.sha256(marks.encode()).hexdigest()[:32] + "." + _extension(info.key)


def _paired(source: int, paths: dict[str, Path], extensions: Sequence[str]) -> list[Found]:
    """Samples with the caption file of the same name but `.txt`, sounds also with that of their lyrics."""

    def beside(name: str, ending: str) -> FileFacts | None:
        path = paths.get(_stem(name) + ending)
        return None if path is None else FileFacts.of(str(path))

    return [
        Found(
            source,
            name,
            FileFacts.of(str(path)),
            beside(name, ".txt"),
            lyrics=beside(name, ".lyrics.txt") if _extension(name) in SOUNDS else None,
        )
        for name, path in sorted(paths.items())
        if _extension(name) in extensions
    ]


def _pictures_by_stem(paths: Mapping[str, Path]) -> dict[str, list[Path]]:
    table: dict[str, list[Path]] = {}
    for name, path in sorted(paths.items()):
        if _extension(name) in PICTURES:
            table.setdefault(_stem(name), []).append(path)
    return table


def _companion(sample: Found, table: Mapping[str, list[Path]], field: str) -> FileFacts | str:
    """The one picture of the sample's name, or why there is not one."""
    stem = _stem(sample.name)
    found = table.get(stem, [])
    if len(found) == 1:
        return FileFacts.of(str(found[0]))
    place = f"spec.data.sources[{sample.source}].{field}"
    if not found:
        return f"no picture {stem}.* in {place}"
    return f"{len(found)} pictures {stem}.* in {place}, where there must be one"


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below `root` that are not hidden. A folder reached twice through links is read once."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_warn):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        yield from (str(below / name) for name in _visible(files))


def _warn(error: OSError) -> None:
    log.warning("folder could not be read", extra={"path": error.filename, "error": str(error)})


def _visible(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not name.startswith("."))


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(key).parts)


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")
