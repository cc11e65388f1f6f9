"""A folder as a store. An object appears by one rename or link, after its bytes have reached the disk."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from atelier_api.errors import ConfigError, StoreError
from atelier_runtime.store.protocol import CorruptObject, ObjectInfo, ObjectMissing, check_key, sha256_of_file

_UNFINISHED = ".unfinished"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LocalStore:
    """Objects are files below `folder`, which is made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @property
    def uri(self) -> str:
        return str(self._folder)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        target = self._path(key)
        with self._errors("write", target), self._temporary() as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                _sync(file.fileno())
            if if_absent:
                written = self._publish_new(temporary, target)
                return written or target.read_bytes() == data
            _in_folder(target.parent, lambda: temporary.replace(target))
        return True

    def put_file(self, key: str, path: Path, sha256: str, *, move: bool = False) -> None:
        target = self._path(key)
        with self._errors("write", target):
            if move and self._publish_by_rename(path, target):
                return
            with self._temporary() as temporary:
                with path.open("rb") as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    _sync(file.fileno())
                if sha256_of_file(temporary) != sha256:
                    raise CorruptObject(f"{path} changed while it was copied to {target}; its SHA-256 is not {sha256}")
                _in_folder(target.parent, lambda: temporary.replace(target))
            if move:
                path.unlink()

    def get_bytes(self, key: str) -> bytes:
        path = self._path(key)
        with self._errors("read", path):
            return path.read_bytes()

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        link: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        source = self._path(key)
        with self._errors("read", source):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                if not (link and _link(source, temporary)):
                    shutil.copyfile(source, temporary)
                if sha256 is not None and sha256_of_file(temporary) != sha256:
                    raise CorruptObject(f"{source} is damaged: its SHA-256 is not {sha256}")
                if progress is not None:
                    progress(temporary.stat().st_size)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        start = self._folder / prefix.rpartition("/")[0]
        found = []
        with self._errors("list", start):
            for folder, folders, names in os.walk(start):
                if _UNFINISHED in folders and Path(folder) == self._folder:
                    folders.remove(_UNFINISHED)
                for name in names:
                    path = Path(folder, name)
                    key = path.relative_to(self._folder).as_posix()
                    if key.startswith(prefix) and (info := self._info(key, path)):
                        found.append(info)
        return sorted(found, key=lambda info: info.key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with self._errors("delete", path):
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with self._errors("read", path):
            return self._info(key, path)

    def now(self) -> datetime:
        return datetime.now(UTC)

    def remove_unfinished(self, older_than_seconds: float) -> int:
        removed = 0
        folder = self._folder / _UNFINISHED
        with self._errors("delete", folder):
            for path in folder.iterdir() if folder.is_dir() else ():
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _path(self, key: str) -> Path:
        return self._folder / check_key(key)

    @staticmethod
    def _info(key: str, path: Path) -> ObjectInfo | None:
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """Path of a new file on the same file system as the objects; gone afterwards, unless it became one."""
        folder = self._folder / _UNFINISHED
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / secrets.token_hex(8)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _publish_new(self, temporary: Path, target: Path) -> bool:
        """Publish where nothing is; False where something is."""

        def publish() -> None:
            if not _link(temporary, target):
                # A file system without hard links: reserve the name, then rename over the reservation.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o644))
                temporary.replace(target)

        try:
            _in_folder(target.parent, publish)
        except FileExistsError:
            return False
        return True

    def _publish_by_rename(self, path: Path, target: Path) -> bool:
        """Make the file itself the object; False where it lies on another file system."""
        with path.open("rb") as file:
            _sync(file.fileno())
        try:
            _in_folder(target.parent, lambda: path.replace(target))
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            raise
        return True

    def _remove_empty(self, folder: Path) -> None:
        """Remove folders that hold nothing any more, below the root."""
        while folder != self._folder:
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                return
            folder = folder.parent

    @contextmanager
    def _errors(self, verb: str, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissing(f"cannot {verb} {error.filename or path}: there is no such file") from error
        except PermissionError as error:
            raise ConfigError(
                f"cannot {verb} {path}: {error.strerror}; give this user access to spec.storage.uri or choose another folder"
            ) from error
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise StoreError(f"cannot {verb} {path}: {what}") from error


def _link(source: Path, target: Path) -> bool:
    """Make `target` the same file as `source`; False where the file system has no hard links. Raises FileExistsError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _in_folder(folder: Path, publish: Callable[[], object]) -> None:
    """Run `publish`, which makes a name in `folder`, and make that name durable."""
    for attempt in range(3):
        _make_folder(folder)
        try:
            publish()
            break
        except FileNotFoundError:  # another writer has just removed the folder, which was empty
            if attempt == 2:
                raise
    _sync_folder(folder)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make names in the folder durable: without it a crash can lose a rename that has been acknowledged."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
