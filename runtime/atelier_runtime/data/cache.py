"""The cache of encoded samples: named tensors in sharded safetensors files, found by 32-byte keys.

    shards/<name>.safetensors        one flat tensor per column; uncompressed, read through a memory map
    shards/<name>.<digest>.index     keys, offsets and shapes; the size, time and SHA-256 of the data file

A column holds one kind of tensor (name, dtype, number of dimensions) of all entries of the shard, one after the other, so a
header stays small and a hundred thousand entries open in a fraction of a second. The index is written last, by rename: a
shard without one does not exist. Its name contains the digest of its content. The data file is hashed again only when its time is
not the one recorded; a shard that fails is removed, and its entries are missing until they are built again.

Reading never verifies: that would cost more than the read. Readers and writers of several processes need no lock.
"""

import hashlib
import json
import logging
import math
import os
import threading
import time
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atelier_api.errors import StoreError
from atelier_runtime.data.keys import file_sha256, replace_file, sync_folder

log = logging.getLogger(__name__)

Entry = Mapping[str, Tensor]

FRAMES = "frames."
"""Begins the names of tensors that tell of the frames that the network is shown, in the entry of a clip's latents."""

_FORMAT = "1"
_KEY_BYTES = 32
_LEFTOVER_SECONDS = 86_400
_OPEN_SHARDS = 256
"""Mapped files kept open. Opening one again takes about 100 microseconds."""


@dataclass(frozen=True)
class _Column:
    """Where the entries of a shard lie in one flat tensor. `offsets` [n] is -1 for entries without this tensor; `shapes` [n, d].

    Both are None where every entry has `alike`, the same shape: entry i is then the i-th piece.
    """

    tensor: str
    name: str
    alike: tuple[int, ...] | None
    offsets: NDArray[np.int64] | None
    shapes: NDArray[np.int64] | None

    @classmethod
    def of(cls, tensor: str, name: str, offsets: NDArray[np.int64], shapes: NDArray[np.int64]) -> "_Column":
        shape = tuple(shapes[0].tolist())
        step = math.prod(shape)
        if (shapes == shapes[0]).all() and (offsets == np.arange(len(offsets)) * step).all():
            return cls(tensor, name, shape, None, None)
        return cls(tensor, name, None, offsets, shapes)


@dataclass(frozen=True)
class _Shard:
    path: Path
    count: int
    columns: tuple[_Column, ...]


@dataclass(frozen=True)
class _Mapped:
    """The columns of an open shard, looking into the mapped file.

    `alike` [n, *shape] by tensor name; `others` with the flat tensor that their entries lie in.
    """

    alike: tuple[tuple[str, Tensor], ...]
    others: tuple[tuple[_Column, Tensor], ...]


@dataclass
class ShardWriter:
    """Collects entries and writes them as one shard."""

    folder: Path
    size_bytes: int = 0
    _entries: dict[bytes, Entry] = field(default_factory=dict)

    def add(self, key: bytes, entry: Entry) -> None:
        """Take an entry; its tensors are copied to the CPU."""
        kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in entry.items()}
        self._entries[key] = kept
        self.size_bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def __len__(self) -> int:
        return len(self._entries)

    def commit(self) -> None:
        """Write the entries taken so far; they are durable and visible to all when this returns. Raises StoreError (disk full)."""
        if not self._entries:
            return
        flat, arrays, names = _packed(list(self._entries.values()))
        arrays["keys"] = np.frombuffer(b"".join(self._entries), np.uint8).reshape(-1, _KEY_BYTES)
        try:
            self._write(flat, arrays, names)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"the cache folder {self.folder} cannot be written ({error}); is its disk full?"
            ) from error
        self._entries, self.size_bytes = {}, 0

    def _write(self, flat: dict[str, Tensor], arrays: dict[str, NDArray[Any]], names: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = self.folder / f".{path.name}"
        try:
            safetensors.torch.save_file(flat, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            digest = file_sha256(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        stat = path.stat()
        facts = {
            "format": _FORMAT,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": digest,
            "columns": names,
        }
        content = safetensors.numpy.save(arrays, {"facts": json.dumps(facts)})
        sync_folder(self.folder)
        replace_file(self.folder / f"{path.stem}.{_content_name(content)}.index", content)


class Cache:
    """All shards of a folder. Entries are found by key once and then read by row, from any thread of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "shards"
        self._shards: list[_Shard] = []
        self._starts: list[int] = []
        self._rows: dict[bytes, int] = {}
        self._loaded: set[str] = set()
        self._open: OrderedDict[int, _Mapped] = OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def refresh(self) -> None:
        """Take in shards that were committed since. Damaged ones are removed."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.index")):
            if path.name in self._loaded or path.name.startswith("."):
                continue
            loaded = _load(path)
            if loaded is None:
                continue
            shard, keys = loaded
            start = sum(other.count for other in self._shards[-1:]) + (self._starts[-1] if self._starts else 0)
            self._rows.update(zip(keys, range(start, start + shard.count), strict=True))
            self._shards.append(shard)
            self._starts.append(start)
            self._loaded.add(path.name)

    def row(self, key: bytes) -> int | None:
        """The row of an entry, valid as long as this object; None where there is none."""
        return self._rows.get(key)

    def forget_keys(self) -> None:
        """Frees what is only needed to find rows."""
        self._rows = {}

    def read(self, row: int) -> dict[str, Tensor]:
        """The tensors of an entry. They look into the mapped file: copy before writing. Raises StoreError where it is gone."""
        number = bisect_right(self._starts, row) - 1
        place = row - self._starts[number]
        mapped = self._opened(number)
        entry = {name: column[place] for name, column in mapped.alike}
        for column, flat in mapped.others:
            assert column.offsets is not None
            assert column.shapes is not None
            start, shape = int(column.offsets[place]), column.shapes[place].tolist()
            if start >= 0:
                entry[column.name] = flat[start : start + math.prod(shape)].view(shape)
        return entry

    def _opened(self, number: int) -> _Mapped:
        with self._lock:
            mapped = self._open.get(number)
            if mapped is None:
                mapped = self._open[number] = _mapped(self._shards[number])
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return mapped


def _mapped(shard: _Shard) -> _Mapped:
    """The columns of a shard as views of the mapped file, which stays mapped as long as one of them is held."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            flat = [file.get_tensor(column.tensor) for column in shard.columns]
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"the cache file {shard.path} cannot be read any more ({error}); it is built again at the next start"
        ) from error
    pairs = list(zip(shard.columns, flat, strict=True))
    return _Mapped(
        alike=tuple(
            (column.name, tensor.view(shard.count, *column.alike))
            for column, tensor in pairs
            if column.alike is not None
        ),
        others=tuple((column, tensor) for column, tensor in pairs if column.alike is None),
    )


def remove_leftovers(shards: Path) -> None:
    """Removes what killed writers left behind in a folder of shards: files without an index that are older than a day."""
    if not shards.is_dir():
        return
    indexed = {path.name.split(".")[0] for path in shards.glob("*.index")}
    too_old = time.time() - _LEFTOVER_SECONDS
    for path in shards.iterdir():
        if path.suffix == ".index" and not path.name.startswith("."):
            continue
        try:
            if (path.name.startswith(".") or path.stem not in indexed) and path.stat().st_mtime < too_old:
                path.unlink()
        except OSError as error:
            log.info("leftover cache file was not removed", extra={"path": str(path), "error": str(error)})


def _packed(entries: Sequence[Entry]) -> tuple[dict[str, Tensor], dict[str, NDArray[Any]], dict[str, str]]:
    """(flat tensors by column, offsets and shapes by column, tensor name by column)."""
    pieces: dict[str, list[Tensor]] = {}
    arrays: dict[str, NDArray[Any]] = {}
    names: dict[str, str] = {}
    ends: dict[str, int] = {}
    for place, entry in enumerate(entries):
        for name, tensor in entry.items():
            column = f"{name}/{str(tensor.dtype).removeprefix('torch.')}/{tensor.ndim}"
            if column not in names:
                names[column], pieces[column], ends[column] = name, [], 0
                arrays[f"offsets/{column}"] = np.full(len(entries), -1, np.int64)
                arrays[f"shapes/{column}"] = np.zeros((len(entries), tensor.ndim), np.int64)
            arrays[f"offsets/{column}"][place] = ends[column]
            arrays[f"shapes/{column}"][place] = tensor.shape
            pieces[column].append(tensor.reshape(-1))
            ends[column] += tensor.numel()
    return {column: torch.cat(parts) for column, parts in pieces.items()}, arrays, names


def _load(path: Path) -> tuple[_Shard, list[bytes]] | None:
    """The shard of an index file and its keys; None for one that is damaged, which is removed together with its data."""
    data = path.with_name(path.name.split(".")[0] + ".safetensors")
    try:
        content = path.read_bytes()
        if path.name.split(".")[1] != _content_name(content):
            _discard(path, data, "its index is damaged")
            return None
        facts = json.loads(_metadata(content)["facts"])
        if facts["format"] != _FORMAT:
            return None
        reason = _fault(data, facts)
        if reason:
            _discard(path, data, reason)
            return None
        arrays = safetensors.numpy.load(content)
    except FileNotFoundError:  # removed by another process meanwhile
        return None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        _discard(path, data, str(error))
        return None
    columns = tuple(
        _Column.of(column, name, arrays[f"offsets/{column}"], arrays[f"shapes/{column}"])
        for column, name in facts["columns"].items()
    )
    keys = arrays["keys"].tobytes()
    count = len(arrays["keys"])
    return _Shard(data, count, columns), [keys[i * _KEY_BYTES : (i + 1) * _KEY_BYTES] for i in range(count)]


def _fault(data: Path, facts: Mapping[str, Any]) -> str:
    """What is wrong with a data file; empty if nothing is."""
    try:
        stat = data.stat()
    except FileNotFoundError:
        return "its data file is gone"
    if stat.st_size != facts["size"]:
        return f"its data file has {stat.st_size} bytes instead of {facts['size']}"
    if stat.st_mtime_ns == facts["mtime_ns"]:
        return ""
    if file_sha256(data) != facts["sha256"]:
        return "its data file has another SHA-256 than when it was written"
    try:  # a copied cache: remember that it was checked
        os.utime(data, ns=(stat.st_atime_ns, facts["mtime_ns"]))
    except OSError:
        log.info("cache file is hashed at every start, its time cannot be set", extra={"path": str(data)})
    return ""


def _discard(index: Path, data: Path, reason: str) -> None:
    log.warning("cache shard is damaged and built again", extra={"path": str(index), "reason": reason})
    for path in (index, data):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("damaged cache file cannot be removed", extra={"path": str(path), "error": str(error)})


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def _content_name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
