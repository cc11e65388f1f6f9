"""The manifest: what makes a folder of files a checkpoint, written after all of them, with the hash of each and of itself.

    checkpoints/<step>-<attempt>-<save id>/<file>              files of one save, never written twice
    checkpoints/<step>-<attempt>-<save id>/records/<rank>.json what one rank wrote
    manifests/<step>-<attempt>.json                            the commit marker
    manifests/bad/<step>-<attempt>.json                        one that did not verify

Steps are padded to eight digits, so that a listing is in the order of steps. An attempt is `<n>.<k>`.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from atelier_api.run_file import RunIdentity
from atelier_api.v1alpha1.base import Block
from atelier_runtime.store.protocol import ObjectInfo, sha256_of, sha256_of_file

SCHEMA_VERSION = 1
MANIFESTS = "manifests/"
QUARANTINE = "manifests/bad/"
CHECKPOINTS = "checkpoints/"

_NAME = re.compile(r"(\d{8,})-(\d+)\.(\d+)\.json")
_FOLDER = re.compile(r"(\d{8,})-(\d+)\.(\d+)-([0-9a-f]{8,})")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
_BASE_SUFFIXES = {".json", ".safetensors", ".bin", ".txt", ".model"}


class ManifestError(Exception):
    """A manifest that cannot be believed. The text is the reason."""


class NewerManifest(ManifestError):
    """A manifest in a schema that this version does not know: nothing is wrong with it."""


@dataclass(frozen=True, order=True)
class ManifestName:
    """Which save a key stands for. Ordered as a resume prefers them: by step, then by attempt."""

    step: int
    attempt: int
    restart: int

    @classmethod
    def make(cls, step: int, attempt: str) -> "ManifestName":
        """Of a step and an attempt `<n>.<k>`."""
        number, _, restart = attempt.partition(".")
        return cls(step, int(number), int(restart))

    @classmethod
    def parse(cls, key: str) -> "ManifestName | None":
        """Of a key directly below `manifests/` or `manifests/bad/`; None for other keys."""
        match = _NAME.fullmatch(key.removeprefix(QUARANTINE).removeprefix(MANIFESTS))
        return cls(*map(int, match.groups())) if match else None

    @classmethod
    def of_folder(cls, folder: str) -> "ManifestName | None":
        """Of a folder's name below `checkpoints/`; None for other names."""
        match = _FOLDER.fullmatch(folder)
        return cls(*map(int, match.groups()[:3])) if match else None

    @property
    def file(self) -> str:
        return f"{self.step:08d}-{self.attempt}.{self.restart}.json"

    @property
    def key(self) -> str:
        """Where the manifest is."""
        return MANIFESTS + self.file

    @property
    def quarantine_key(self) -> str:
        """Where it goes when it does not verify."""
        return QUARANTINE + self.file


def folder_name(step: int, attempt: str, save_id: str) -> str:
    """Name of a save's folder, in the store below `checkpoints/` and in the staging folder."""
    return f"{step:08d}-{attempt}-{save_id}"


class FileRecord(Block):
    """A file. `path` is relative to the folder it belongs to."""

    path: str
    size: int
    sha256: str


class Base(Block):
    """The model that the run started from; its frozen weights are not in the checkpoint."""

    source: str
    revision: str | None
    files: tuple[FileRecord, ...]


class DataFacts(Block):
    """What the order of the samples is a function of, together with the step."""

    seed: int
    dataset_hash: str | None


class Manifest(Block):
    """One checkpoint."""

    schema_version: Literal[1] = 1
    run: RunIdentity
    attempt: str
    save_id: str
    step: int
    previous_step: int | None = Field(description="Step of the checkpoint before; none: the first.")
    time: str = Field(description="RFC 3339, UTC, by the store's clock.")
    world_size: int
    strategy: str
    versions: dict[str, str]
    base: Base
    files: tuple[FileRecord, ...]
    data: DataFacts
    store: dict[str, str] = Field(description="What the store was found to be able to do.")

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
        """The names become paths below the staging folder: nothing may lead out of it."""
        for file in files:
            if file.path in ("", ".", "..") or "/" in file.path:
                raise ValueError(f"file name {file.path!r} is not a plain name")
        return files

    @property
    def name(self) -> ManifestName:
        return ManifestName.make(self.step, self.attempt)

    @property
    def folder(self) -> str:
        """Prefix of the files' keys."""
        return f"{CHECKPOINTS}{folder_name(self.step, self.attempt, self.save_id)}/"

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """Canonical JSON that holds its own hash as `sha256`."""
        content = self.model_dump(mode="json", by_alias=True)
        return _canonical(content | {"sha256": sha256_of(_canonical(content))})

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Raises ManifestError with the reason when the bytes are not exactly what `encode` gave, NewerManifest for a newer schema."""
        try:
            content = json.loads(data)
        except ValueError as error:
            raise ManifestError(f"it is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("sha256"), str):
            raise ManifestError("it holds no hash of itself")
        rest = {key: value for key, value in content.items() if key != "sha256"}
        if sha256_of(_canonical(rest)) != content["sha256"] or _canonical(content) != data:
            raise ManifestError("its content does not match its own SHA-256")
        version = rest.get("schemaVersion")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise NewerManifest(f"its schemaVersion is {version}, this version reads up to {SCHEMA_VERSION}")
        try:
            return cls.model_validate(rest)
        except ValidationError as error:
            raise ManifestError(f"it does not fit the schema: {error}") from error

    def missing(self, listing: Iterable[ObjectInfo]) -> str | None:
        """The first file that is not in a listing of `folder` with its size, with the reason; None when all are."""
        sizes = {info.key: info.size for info in listing}
        for file in self.files:
            size = sizes.get(self.folder + file.path)
            if size is None:
                return f"{file.path} is missing"
            if size != file.size:
                return f"{file.path} has {size} bytes instead of {file.size}"
        return None


def describe_base(folder: Path, source: str, revision: str | None) -> Base:
    """The base model's files with their hashes. Reads them all, but those whose name in the hub's cache is their hash."""
    paths = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in _BASE_SUFFIXES)
    files = [_describe(path, path.relative_to(folder).as_posix()) for path in paths if path.is_file()]
    return Base(source=source, revision=revision, files=tuple(files))


def _describe(path: Path, name: str) -> FileRecord:
    blob = path.resolve().name
    digest = blob if path.is_symlink() and _HUB_BLOB.fullmatch(blob) else sha256_of_file(path)
    return FileRecord(path=name, size=path.stat().st_size, sha256=digest)


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
