"""What the files of a source hold: content hash, size, readability, captions. Looked at once, remembered by path, size and time.

The memory is a table in columns (JSON reads those several times faster than rows), one file for each source and kind of look.
It is saved while a long scan goes on, so that a killed one continues.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from atelier_runtime.data.image import UnreadableError, read_picture
from atelier_runtime.data.keys import content_sha256, file_sha256, replace_file
from atelier_runtime.data.sound import probe_sound
from atelier_runtime.data.source import FileFacts
from atelier_runtime.data.video import probe_clip

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_VERSION = 2
"""Raise when the same file would be judged differently."""


@dataclass(frozen=True, slots=True)
class ClipRule:
    """What clips are cut to: `frames` frames at `fps` per second."""

    frames: int
    fps: float


@dataclass(frozen=True, slots=True)
class SoundRule:
    """What sounds are cut to, in samples at `rate` per second: whole units of `unit`, from `least` to `most`.

    One latent is made of a unit. Lengths that are the same when rounded up to a multiple of `step` share a bucket.
    """

    rate: int
    unit: int
    least: int
    most: int
    step: int

    @classmethod
    def of_seconds(cls, rate: int, unit: int, *, least: int, most: int, step: int) -> "SoundRule":
        """`least`, `most` and `step` in seconds, rounded to whole units: the first two down, the last up."""

        def whole(samples: int) -> int:
            return samples // unit * unit

        return cls(rate, unit, whole(least * rate), whole(most * rate), whole(step * rate + unit - 1))


Rule = ClipRule | SoundRule | None
"""How samples are cut; None for pictures."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is in a file. `reason` says why it is unreadable, empty if it is not; `frames` is 1 for pictures.

    A sound is of 1 x 1, and its frames are samples.
    """

    content: str
    width: int
    height: int
    frames: int
    reason: str


@dataclass(frozen=True, slots=True)
class CaptionText:
    """Content of a caption file. `text` is None where `reason` says why it cannot be read."""

    text: str | None
    reason: str


def probe(file: FileFacts, rule: Rule) -> Probe:
    """Reads a file whole: a picture, or what `rule` leaves of a clip or sound. Never raises for what is wrong with the file."""
    try:
        if rule is not None:
            content = file_sha256(Path(file.path))
            try:
                if isinstance(rule, SoundRule):
                    return Probe(content, 1, 1, probe_sound(Path(file.path), rule.rate, rule.most), "")
                clip = probe_clip(Path(file.path), rule.frames, rule.fps)
            except UnreadableError as error:
                return Probe(content, 0, 0, 0, str(error))
            return Probe(content, clip.width, clip.height, clip.frames, "")
        data = Path(file.path).read_bytes()
        content = content_sha256(data)
        try:
            width, height = read_picture(data).size
        except UnreadableError as error:
            return Probe(content, 0, 0, 0, str(error))
        return Probe(content, width, height, 1, "")
    except OSError as error:
        return Probe("", 0, 0, 0, error.strerror or str(error))


def read_caption(file: FileFacts, what: str = "caption") -> CaptionText:
    """Reads a caption file, or one of what else is written. Never raises for what is wrong with the file."""
    path = Path(file.path)
    try:
        return CaptionText(path.read_text(encoding="utf-8-sig"), "")
    except UnicodeDecodeError:
        return CaptionText(None, f"its {what} {path.name} is not UTF-8")
    except OSError as error:
        return CaptionText(None, f"its {what} {path.name} cannot be read: {error.strerror}")


class ScanMemory:
    """Results of earlier scans of one source. Entries of files that are gone or changed are dropped when it is saved."""

    def __init__(self, folder: Path, uri: str, rule: Rule) -> None:
        if isinstance(rule, SoundRule):
            look = f"sound {rule.rate} {rule.most}"
        else:
            look = "picture" if rule is None else f"clip {rule.frames} {rule.fps!r}"
        name = hashlib.sha256(f"{uri}\n{look}".encode()).hexdigest()[:32]
        self._path = folder / "scans" / f"{name}.json"
        self._probes, self._captions = _read(self._path)

    def probe_of(self, file: FileFacts) -> Probe | None:
        """What is known of a file in its present state."""
        return self._probes.get(file)

    def caption_of(self, file: FileFacts) -> CaptionText | None:
        """What is known of a caption file in its present state."""
        return self._captions.get(file)

    def replace(self, probes: dict[FileFacts, Probe], captions: dict[FileFacts, CaptionText]) -> None:
        """Remember exactly these, and write them down if they are news. Failing to write only costs time at the next start."""
        # A file that could not be looked at or read may be there again without any mark having changed.
        probes = {file: value for file, value in probes.items() if value.content}
        captions = {file: value for file, value in captions.items() if file.size >= 0 and value.text is not None}
        if probes == self._probes and captions == self._captions:
            return
        self._probes, self._captions = probes, captions
        table = {
            "version": _VERSION,
            "probes": [_columns(probes, FileFacts), _columns(probes.values(), Probe)],
            "captions": [_columns(captions, FileFacts), _columns(captions.values(), CaptionText)],
        }
        try:
            replace_file(self._path, json.dumps(table).encode())
        except OSError as error:
            log.warning("scan result was not kept", extra={"path": str(self._path), "error": str(error)})


def in_threads(work: Callable[[T], R], items: Sequence[T], *, threads: int) -> list[R]:
    """`work` on every item, several at a time (decoders and hashing release the interpreter lock)."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _read(path: Path) -> tuple[dict[FileFacts, Probe], dict[FileFacts, CaptionText]]:
    try:
        table = json.loads(path.read_text())
        if table["version"] != _VERSION:
            return {}, {}
        probes = dict(zip(_rows(table["probes"][0], FileFacts), _rows(table["probes"][1], Probe), strict=True))
        captions = dict(
            zip(_rows(table["captions"][0], FileFacts), _rows(table["captions"][1], CaptionText), strict=True)
        )
        return probes, captions
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("scan memory is damaged, files are looked at again", extra={"path": str(path), "error": str(error)})
        return {}, {}


def _columns(items: Iterable[Any], kind: type) -> dict[str, list[Any]]:
    rows = list(items)
    return {field.name: [getattr(row, field.name) for row in rows] for field in fields(kind)}


def _rows(columns: dict[str, list[Any]], kind: type[T]) -> list[T]:
    return [kind(*values) for values in zip(*(columns[field.name] for field in fields(kind)), strict=True)]  # type: ignore[arg-type]
