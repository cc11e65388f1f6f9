"""Copies of a state in memory that the trainer shares with its writer process: one memory copy is all the trainer waits for.

The state is pickled with every tensor replaced by its number; the tensors' bytes lie one after another at the start of the
memory, the pickle behind them. The memory is kept from save to save, so that only the first one pays for new pages.
"""

import io
import logging
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)

_ALIGNMENT = 64

_Shape = tuple[torch.dtype, torch.Size, tuple[int, ...] | None, tuple[int, ...] | None]
"""Of a tensor: dtype, shape, and for a shard the whole shape and where the shard begins in it."""


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in the memory. A shard of a larger one has that one's shape and where the shard begins in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    whole_shape: tuple[int, ...] | None
    offsets: tuple[int, ...] | None


@dataclass(frozen=True)
class SnapshotFacts:
    """Where a snapshot lies in its memory, and how much of it is tensors."""

    memory_bytes: int
    tensor_bytes: int
    pickle_bytes: int
    sharded: bool


class SharedMemory:
    """Memory of two processes, by a file descriptor that the child inherits. It only grows."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._pinned: Tensor | None = None

    @classmethod
    def create(cls, folder: Path) -> "SharedMemory":
        """New and empty: memory where the system has it, else an unnamed file in `folder`."""
        if hasattr(os, "memfd_create"):  # unlike /dev/shm it has no small limit of its own in a container
            return cls(os.memfd_create("atelier-snapshot"))
        with tempfile.TemporaryFile(dir=folder) as file:
            return cls(os.dup(file.fileno()))

    def reserve(self, size: int) -> "mmap.mmap":
        """The memory, at least `size` bytes of it."""
        if self._map is None or len(self._map) < size:
            self._unpin()
            size = max(size, os.fstat(self.descriptor).st_size)
            os.ftruncate(self.descriptor, size)
            self._map = mmap.mmap(self.descriptor, size)
        return self._map

    def pin(self) -> None:
        """Let the GPU write into it directly."""
        if self._map is None or self._pinned is not None:
            return
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        status = _cuda_runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(status) != 0:
            log.warning("snapshot memory cannot be pinned; copies are slower", extra={"status": str(status)})
        self._pinned = memory

    def close(self) -> None:
        self._unpin()
        os.close(self.descriptor)

    def _unpin(self) -> None:
        if self._pinned is not None:
            _cuda_runtime().cudaHostUnregister(self._pinned.data_ptr())
            self._pinned = None


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class SnapshotTaker:
    """The trainer's end of one memory."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self._shapes: list[_Shape] = []
        self._places: list[TensorPlace] = []
        self._pickled_places = b""
        self._map: mmap.mmap | None = None
        self._targets: list[Tensor] = []
        self._offsets: dict[Any, tuple[int, ...]] = {}

    def take(self, state: dict[str, Any]) -> SnapshotFacts:
        """Copy `state`, which may change as soon as this returns. Raises TypeError for what cannot be saved."""
        sources: list[Tensor] = []
        shapes: list[_Shape] = []

        def number(item: object) -> int | None:
            if not isinstance(item, Tensor):
                return None
            local, whole, offsets = self._local(item)
            sources.append(local)
            shapes.append((local.dtype, local.shape, whole, offsets))
            return len(sources) - 1

        skeleton = _dumps(state, number)
        if shapes != self._shapes:
            self._places, self._map = _lay_out(shapes), None
            self._pickled_places = pickle.dumps(self._places, pickle.HIGHEST_PROTOCOL)
            self._shapes = shapes
        tensor_bytes = _end(self._places)
        pickles = self._pickled_places + skeleton
        memory = self.memory.reserve(tensor_bytes + len(pickles))
        if memory is not self._map:
            self._targets = [_view(memory, place) for place in self._places]
            self._map = memory
        self._copy(sources)
        memory[tensor_bytes : tensor_bytes + len(pickles)] = pickles
        sharded = any(place.offsets is not None for place in self._places)
        return SnapshotFacts(len(memory), tensor_bytes, len(pickles), sharded)

    def _copy(self, sources: list[Tensor]) -> None:
        from_gpu = any(source.is_cuda for source in sources)
        if from_gpu:
            self.memory.pin()
        with torch.no_grad():
            torch._foreach_copy_(self._targets, sources, non_blocking=from_gpu)
        if from_gpu:
            torch.cuda.synchronize()

    def _local(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...] | None, tuple[int, ...] | None]:
        """What this rank holds of a tensor; for a shard also the whole shape and the shard's place."""
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            key = (tensor.shape, tensor.device_mesh, tensor.placements)
            if key not in self._offsets:
                (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
                self._offsets[key] = tuple(chunk.offsets)
            whole, offsets = tuple(tensor.shape), self._offsets[key]
        else:
            local, whole, offsets = tensor, None, None
        if type(local) not in (Tensor, torch.nn.Parameter) or local.layout != torch.strided:
            raise TypeError(
                f"a {type(local).__name__} of layout {local.layout} cannot be saved; only dense tensors can"
            )
        return local.detach(), whole, offsets


def load_snapshot(memory: SharedMemory, facts: SnapshotFacts) -> dict[str, Any]:
    """The state of a snapshot, its tensors in place in the memory, its shards as `Shard`."""
    buffer = memory.reserve(facts.memory_bytes)
    pickles = io.BytesIO(buffer[facts.tensor_bytes : facts.tensor_bytes + facts.pickle_bytes])
    places: list[TensorPlace] = pickle.load(pickles)
    state: dict[str, Any] = _Unpickler(pickles, [_restore(buffer, place) for place in places]).load()
    return state


class Shard(Tensor):
    """A part of a larger tensor, as torch.distributed.checkpoint wants to see it. Needs no device mesh and no GPU."""

    whole_shape: torch.Size
    offsets: torch.Size
    local: Tensor

    @staticmethod
    def make(local: Tensor, whole_shape: Sequence[int], offsets: Sequence[int]) -> "Shard":
        shard: Shard = Tensor._make_subclass(Shard, local)
        shard.local, shard.whole_shape, shard.offsets = local, torch.Size(whole_shape), torch.Size(offsets)
        return shard

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.whole_shape)
        return [WriteItem(MetadataIndex(name, self.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offsets, self.local.size())]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, number: Callable[[object], int | None]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._number = number

    def persistent_id(self, item: object) -> int | None:
        return self._number(item)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _dumps(state: object, number: Callable[[object], int | None]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, number).dump(state)
    return file.getvalue()


def _lay_out(shapes: Sequence[_Shape]) -> list[TensorPlace]:
    places = []
    start = 0
    for dtype, shape, whole, offsets in shapes:
        place = TensorPlace(dtype, tuple(shape), start, whole, offsets)
        places.append(place)
        start = _end([place])
    return places


def _end(places: Sequence[TensorPlace]) -> int:
    """First byte behind the tensors."""
    if not places:
        return 0
    last = places[-1]
    return -(-(last.start + _bytes(last)) // _ALIGNMENT) * _ALIGNMENT


def _bytes(place: TensorPlace) -> int:
    size = place.dtype.itemsize
    for length in place.shape:
        size *= length
    return size


def _view(memory: mmap.mmap, place: TensorPlace) -> Tensor:
    """The tensor in the memory, with a storage of its own: torch.save would write all of a shared one."""
    size = _bytes(place)
    if size == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=place.start)
    return flat.view(place.dtype).view(place.shape)


def _restore(memory: mmap.mmap, place: TensorPlace) -> Tensor:
    tensor = _view(memory, place)
    if place.whole_shape is None or place.offsets is None:
        return tensor
    return Shard.make(tensor, place.whole_shape, place.offsets)
