"""Snapshots in shared memory: exact copies of whatever a state may hold."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_runtime.checkpoint.snapshot import Shard, SharedMemory, SnapshotTaker, load_snapshot
from checkpoint_runs import same, state_of


@pytest.fixture
def memory(tmp_path: Path) -> Any:
    memory = SharedMemory.create(tmp_path)
    yield memory
    memory.close()


def copied(memory: SharedMemory, state: dict[str, Any], taker: SnapshotTaker | None = None) -> dict[str, Any]:
    """The state as the other process sees it, through a mapping of its own."""
    facts = (taker or SnapshotTaker(memory)).take(state)
    return load_snapshot(SharedMemory(os.dup(memory.descriptor)), facts)


def test_nested_states_of_tensors_and_plain_values_come_through(memory: SharedMemory) -> None:
    state = state_of(7) | {"list": [torch.ones(2), {"deep": torch.zeros(1)}], "nothing": None, "text": "é"}
    seen = copied(memory, state)
    assert same(seen | {"list": 0}, state | {"list": 0})
    assert torch.equal(seen["list"][0], torch.ones(2))
    assert torch.equal(seen["list"][1]["deep"], torch.zeros(1))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ],
)
def test_every_dtype_comes_through(memory: SharedMemory, dtype: torch.dtype) -> None:
    tensor = torch.arange(33).to(torch.float32).to(dtype)
    seen = copied(memory, {"a": torch.zeros(1), "b": tensor})["b"]
    assert seen.dtype == dtype
    assert torch.equal(seen.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(10.0)[::2],
        torch.zeros(1).expand(5),
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=["scalar", "empty", "empty-3d", "transposed", "strided", "expanded", "parameter"],
)
def test_every_layout_comes_through(memory: SharedMemory, tensor: torch.Tensor) -> None:
    seen = copied(memory, {"x": tensor})["x"]
    assert seen.shape == tensor.shape
    assert torch.equal(seen, tensor)
    assert seen.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_later_changes_of_the_state_do_not_show(memory: SharedMemory) -> None:
    state = state_of(1)
    taker = SnapshotTaker(memory)
    facts = taker.take(state)
    state["weights"]["block.0.weight"].zero_()
    state["note"]["losses"].append(1)
    assert same(load_snapshot(SharedMemory(os.dup(memory.descriptor)), facts), state_of(1))


def test_the_memory_is_kept_and_grows_when_the_state_does(memory: SharedMemory) -> None:
    taker = SnapshotTaker(memory)
    first = taker.take(state_of(1))
    assert taker.take(state_of(2)).memory_bytes == first.memory_bytes
    large = state_of(3) | {"more": torch.randn(100_000)}
    assert same(copied(memory, large, taker), large)
    assert os.fstat(memory.descriptor).st_size >= 400_000
    assert same(copied(memory, state_of(4), taker), state_of(4))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,), check_invariants=True),
        Shard.make(torch.ones(1), (2,), (0,)),
    ],
    ids=["sparse", "subclass"],
)
def test_what_cannot_be_saved_is_named(memory: SharedMemory, tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="cannot be saved; only dense tensors can"):
        SnapshotTaker(memory).take({"x": tensor})


def test_without_anonymous_memory_an_unnamed_file_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    memory = SharedMemory.create(tmp_path)
    assert same(copied(memory, state_of(5)), state_of(5))
    assert list(tmp_path.iterdir()) == []
    memory.close()
