"""A checkpoint below an S3 prefix, copied into a folder on this machine.

    <cache>/<bucket>-<hash of endpoint and prefix>/<hash of keys, sizes and ETags>/    the checkpoint; appears by one rename
                                                   .<hash>.unfinished/                 files so far, each of them whole
                                                   current                             name of the newest checkpoint

Another content of the prefix is another folder: a run that trains from the old one is not disturbed. The list of objects is asked for
at every start; nothing is fetched where the folder is there.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from atelier_api.errors import ConfigError, RunError, StoreError
from atelier_api.families import FamilyFacts
from atelier_api.model_files import INDEX, current_copy, lacking, needed, objects_folder
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.fetching.index import check_index, parse_index
from atelier_runtime.fetching.transfer import Meter, Transfer, Watch, alone, check_space, disk_error, gigabytes, run
from atelier_runtime.store import CorruptObject, ObjectInfo, Store, open_store

_MD5 = re.compile(r"[0-9a-f]{32}")


def fetch_objects(source: str, s3: S3Settings, family: FamilyFacts, *, cache: Path, watch: Watch) -> Path:
    """The folder with the checkpoint. Raises ConfigError, CredentialsError, StoreError."""
    root = objects_folder(cache, source, s3)
    with _named(source, root):
        store = open_store(source, s3)
        objects = {info.key: info for info in store.list("")}
        if INDEX not in objects:
            raise ConfigError(
                f"there is no {INDEX} among its {len(objects)} objects; it must be laid out as a diffusers pipeline"
            )
        data = store.get_bytes(INDEX)
        index = parse_index(source, data)
        check_index(source, index, family)
        chosen = [objects[key] for key in needed(objects, index)]
        missing = lacking(objects, index)
        if missing:
            raise ConfigError(f"it lacks {', '.join(missing[:5])}; it must be a whole diffusers checkpoint")
        folder = root / _content_key(chosen)
        if not folder.is_dir():
            with alone(root / "lock", watch):
                if not folder.is_dir():  # still, after the wait
                    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest() == objects[INDEX].etag
                    _fetch(source, store, chosen, folder, etags_are_md5=md5, watch=watch)
        if current_copy(root) != folder:
            _point(root / "current", folder.name)
    return folder


def _fetch(
    source: str, store: Store, objects: Sequence[ObjectInfo], folder: Path, *, etags_are_md5: bool, watch: Watch
) -> None:
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    _tidy(folder.parent, unfinished, {info.key for info in objects})
    transfers = []
    for info in objects:
        path = unfinished / info.key
        here = info.size if path.is_file() and path.stat().st_size == info.size else 0
        fetch = partial(_fetch_object, store, info, path, etags_are_md5)
        transfers.append(Transfer(info.size, here, (lambda _: None) if here else fetch))
    size, here = sum(each.size for each in transfers), sum(each.here for each in transfers)
    check_space(size - here, folder.parent, remedy="set XDG_CACHE_HOME to a folder on a larger one")
    rest = f", {gigabytes(here)} of them are here" if here else ""
    watch.note(f"fetching {source}: {len(objects)} files, {gigabytes(size)}{rest}")
    run(transfers, watch)
    unfinished.rename(folder)


def _fetch_object(store: Store, info: ObjectInfo, path: Path, etags_are_md5: bool, meter: Meter) -> None:
    """Copy one object, and compare it with its size and with the hash that the store gives, if it gives one."""
    head = store.head(info.key)
    if head is None or head.etag != info.etag:
        raise StoreError(f"{info.key} has changed while the checkpoint was fetched; run again")
    arriving = path.with_name(f".{path.name}.arriving")
    store.get_file(info.key, arriving, sha256=head.sha256, progress=meter.add)
    size = arriving.stat().st_size
    if size != info.size:
        raise CorruptObject(f"{info.key} arrived with {size} bytes, the store says {info.size}")
    if head.sha256 is None and etags_are_md5 and _MD5.fullmatch(info.etag):
        with arriving.open("rb") as file:
            if hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest() != info.etag:
                raise CorruptObject(f"{info.key} arrived damaged: its MD5 is not {info.etag}")
    arriving.replace(path)


def _tidy(root: Path, unfinished: Path, keys: set[str]) -> None:
    """Remove what killed downloads have left, but whole files of this content."""
    for other in root.glob(".*.unfinished"):
        if other != unfinished:
            shutil.rmtree(other)
    for path in [path for path in unfinished.rglob("*") if path.is_file()]:
        if path.relative_to(unfinished).as_posix() not in keys:
            path.unlink()
    unfinished.mkdir(parents=True, exist_ok=True)


def _content_key(objects: Sequence[ObjectInfo]) -> str:
    lines = "".join(f"{info.key}\0{info.size}\0{info.etag}\n" for info in objects)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _point(reference: Path, name: str) -> None:
    temporary = reference.with_name(".current")
    temporary.write_text(name)
    temporary.replace(reference)


@contextmanager
def _named(source: str, root: Path) -> Iterator[None]:
    """Errors begin with the field whose value they are about."""
    try:
        yield
    except RunError as error:
        if str(error).startswith("spec.model."):
            raise
        raise type(error)(f"spec.model.source is {source!r}: {error}") from error
    except OSError as error:
        raise disk_error(error, root) from error
