"""Names of cache entries: digests of everything that an entry depends on, so that no edit is ever missed.

Raise SCHEMA_VERSION when the same inputs would give other latents or features: a changed resize, decoding or `encode_text`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atelier_runtime.data.buckets import Placement
from atelier_runtime.family import Song

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Encoding:
    """What all entries of a run share: the family, the identities of its encoders, the precision.

    `rate` is that of clips in frames, and of sounds in samples per second. `largest_whole` is the edge in pixels, or the length of a
    sound, above which the autoencoder works on tiles, whose latents differ; None: never.
    """

    family: str
    autoencoder: str
    text_encoders: str
    precision: str
    rate: float | None
    largest_whole: int | None = None

    def latent_key(self, content: str, placement: Placement) -> bytes:
        """Key of the latents of a file with the SHA-256 `content`, placed so. 32 bytes."""
        # A sound's latents are those of its own length, whatever else is in its bucket.
        frames = placement.length or placement.bucket.frames
        encoder = (self.family, self.autoencoder, self.precision)
        return _digest("latents", *encoder, self.rate, content, placement.sizes, frames, *self._tiles(placement))

    def reference_key(self, content: str, placement: Placement) -> bytes:
        """Key of the latents of a reference picture with the SHA-256 `content`, placed so. 32 bytes."""
        encoder = (self.family, self.autoencoder, self.precision)
        return _digest("reference", *encoder, content, placement.sizes, *self._tiles(placement))

    def condition_key(self, content: str, placement: Placement, *, latents: bool) -> bytes:
        """Key of a conditioning picture with the SHA-256 `content`, placed so: of its pixels, or of its latents. 32 bytes."""
        encoder = (self.family, self.autoencoder, self.precision) if latents else ()
        tiles = self._tiles(placement) if latents else ()
        return _digest("condition", *encoder, content, placement.sizes, *tiles)

    def text_key(self, caption: str, references: Iterable[str] = ()) -> bytes:
        """Key of the text features of a caption, and of the reference pictures (by SHA-256) that its encoder sees. 32 bytes."""
        return _digest("text", self.family, self.text_encoders, self.precision, caption, *references)

    def _tiles(self, placement: Placement) -> tuple[str | int, ...]:
        """What the latents of a sample placed so depend on beyond those of a whole one: nothing where it is in one piece."""
        size = placement.length or max(placement.bucket.width, placement.bucket.height)
        return () if self.largest_whole is None or size <= self.largest_whole else ("tiles", self.largest_whole)

    def song_key(self, song: Song) -> bytes:
        """Key of the text features of a sound: they depend on its lyrics and its length too. 32 bytes."""
        told = (song.caption, song.lyrics, song.seconds)
        return _digest("song", self.family, self.text_encoders, self.precision, *told)

    def shared_key(self) -> bytes:
        """Key of what all samples are told. 32 bytes."""
        return _digest("shared", self.family, self.text_encoders, self.precision)


def crop_draw(seed: int, content: str) -> tuple[float, float]:
    """Where a random crop lies, as fractions (down, right) in [0, 1) of what is left over: one draw per file from the seed."""
    digest = _digest("crop", seed, content)
    return int.from_bytes(digest[:6], "big") / 2**48, int.from_bytes(digest[6:12], "big") / 2**48


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(content: bytes) -> str:
    """SHA-256 of the content of a file, in hex."""
    return hashlib.sha256(content).hexdigest()


def text_components(pipeline_config: Mapping[str, Any], others: Iterable[str]) -> tuple[str, ...]:
    """Components that text features can depend on: all that `model_index.json` names but `others` and the scheduler."""
    left_out = {*others, "scheduler"}
    return tuple(
        sorted(
            name
            for name, value in pipeline_config.items()
            if isinstance(value, list) and name not in left_out and any(part is not None for part in value)
        )
    )


def pipeline_flags(pipeline_config: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings of `model_index.json`, which some pipelines' text encoding looks at."""
    return {
        name: value
        for name, value in pipeline_config.items()
        if not name.startswith("_") and not isinstance(value, list)
    }


class FolderHashes:
    """Digests of folders of a checkpoint. A file's hash is remembered by path, size and time, so encoders are read only once."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._known: dict[str, list[Any]] = json.loads(memory.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, root: Path, folders: Sequence[str], extra: object = None) -> str:
        """One digest over the names and contents of all files in `root`'s `folders`, and over `extra`."""
        lines = [
            (str(path.relative_to(root)), self._file(path))
            for folder in folders
            for path in sorted((root / folder).rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        ]
        return _digest(lines, extra).hex()

    def save(self) -> None:
        """Write what was learnt; a folder that cannot be written only costs time at the next start."""
        try:
            replace_file(self._memory, json.dumps(self._known).encode())
        except OSError as error:
            log.warning("hashes of the encoders were not kept", extra={"error": str(error)})

    def _file(self, path: Path) -> str:
        real = path.resolve()
        stat = real.stat()
        known = self._known.get(str(real))
        if known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        value = file_sha256(real)
        self._known[str(real)] = [stat.st_size, stat.st_mtime_ns, value]
        return value


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, *parts], separators=(",", ":")).encode()).digest()
