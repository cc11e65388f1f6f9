"""Where a run keeps its files: a local folder or an S3-compatible store, behind one protocol."""

from pathlib import Path

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.store.local import LocalStore
from atelier_runtime.store.probe import Capabilities, probe
from atelier_runtime.store.protocol import CorruptObject, ObjectInfo, ObjectMissing, Store, StoreObserver

__all__ = [
    "Capabilities",
    "CorruptObject",
    "LocalStore",
    "ObjectInfo",
    "ObjectMissing",
    "Store",
    "StoreObserver",
    "open_store",
    "probe",
]


def open_store(uri: str, s3: S3Settings, *, observer: StoreObserver | None = None) -> Store:
    """The store at `uri`: `s3://bucket/prefix` or a folder. Sends no request and makes no folder.

    Raises ConfigError for another scheme or a missing CA bundle, CredentialsError where no S3 credentials are found.
    """
    if uri.startswith("s3://"):
        from atelier_runtime.store.s3 import S3Store

        return S3Store(uri, s3, observer=observer)
    if "://" in uri:
        raise ConfigError(f"spec.storage.uri is {uri!r}; allowed are a folder and s3://bucket/prefix")
    return LocalStore(Path(uri))
