"""What a store does, and the errors that all stores raise.

    StoreError           69: unreachable, full, refused for a reason that is not the credentials
    ├── ObjectMissing    there is no such object
    └── CorruptObject    the bytes are not those that were written
    CredentialsError     77: refused, expired, or none found

Keys are relative to the root of the store: `a/b.json`. An object appears whole or not at all.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from atelier_api.errors import ConfigError, StoreError


class ObjectMissing(StoreError, FileNotFoundError):
    """There is no object with that key."""


class CorruptObject(StoreError):
    """The bytes that came do not have the hash they were written with, however often they were read."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object. `modified` is the store's own clock, in UTC.

    `etag`: the store's mark of this very content; empty where it has none. `sha256` (hex): what the object was written with, as
    `head` tells for objects of ours; None where that is not known.
    """

    key: str
    size: int
    modified: datetime
    etag: str = ""
    sha256: str | None = None


class StoreObserver(Protocol):
    """Who counts the requests."""

    def storage_request(self, operation: str, code: str, seconds: float) -> None:
        """One call with all its retries. `code` is `ok`, the store's error code or the class of the error."""

    def storage_retry(self, reason: str) -> None:
        """A whole file was tried again."""


class Store(Protocol):
    """A flat space of objects. Safe to use from several threads."""

    @property
    def uri(self) -> str:
        """Root of the store."""

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object. With `if_absent`, False says that there is one with other bytes, which stays."""

    def put_file(self, key: str, path: Path, sha256: str, *, move: bool = False) -> None:
        """Write a file as an object. `sha256` (hex) is of its content; with `move` the file may be gone afterwards."""

    def get_bytes(self, key: str) -> bytes:
        """The content of a small object. Raises ObjectMissing, CorruptObject."""

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        sha256: str | None = None,
        link: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy an object to `path`, whole or not at all, and check its hash where one is given.

        With `link` the file may be the stored one itself and must not be written. `progress` is called with the bytes that have come
        since it was last, from any thread; negative ones will come again. Raises ObjectMissing, CorruptObject.
        """

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are no error."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None."""

    def now(self) -> datetime:
        """The store's clock, UTC: what ages are measured with."""

    def remove_unfinished(self, older_than_seconds: float) -> int:
        """Remove what killed writers left half written below the root, and give how much there was."""


def check_key(key: str) -> str:
    """The key, or ConfigError where it could leave the root of the store."""
    parts = key.split("/")
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"object key is {key!r}; it must be a relative path without empty, '.' and '..' parts")
    return key


def sha256_of(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content; about 1.7 GB/s on one core."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
