"""Joining a process group, alone and as torchrun's environment says; and the helper that starts ranks for tests."""

import pytest
import torch

from atelier_api.errors import ConfigError
from atelier_api.run_file import ExecutionPlan
from atelier_runtime import parallel
from processes import run_ranks


def plan(processes: int, device: str = "cpu") -> ExecutionPlan:
    return ExecutionPlan(
        strategy="ddp", device=device, nodes=1, processes_per_node=processes, micro_batch_size=1,
        gradient_accumulation=1, gradient_checkpointing=False, learning_rate=1e-4, threads_per_process=1,
        predicted_peak_memory_bytes=0,
    )  # fmt: skip


def test_without_torchrun_there_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    distributed = parallel.start(plan(1))
    try:
        assert distributed == parallel.Distributed(0, 0, 1, torch.device("cpu"))
        value = torch.tensor([3.0])
        torch.distributed.all_reduce(value)
        assert value.item() == 3.0
    finally:
        parallel.stop()
    assert not torch.distributed.is_initialized()
    parallel.stop()  # a second time is harmless


def test_another_number_of_processes_than_the_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="1 processes were started for a plan of 2"):
        parallel.start(plan(2))
    assert not torch.distributed.is_initialized()


def test_a_gpu_that_is_not_there_is_refused_by_the_field_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"spec\.parallelism\.gpusPerNode is 1 and this node has 0 GPUs"):
        parallel.start(plan(1, "cuda"))


@pytest.mark.processes
def test_ranks_of_torchrun_meet_and_a_lost_one_is_noticed_after_the_timeout() -> None:
    first, second = run_ranks(2, "distributed_ranks:meet", plan(2), timeout=120)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["sum"] == second["sum"] == 3.0
    assert "timed out" in first["error"].lower() or "timeout" in first["error"].lower()


@pytest.mark.processes
def test_a_rank_that_fails_is_shown_with_its_output() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 exit code 1(.|\n)*about to fail(.|\n)*ValueError: rank 1 breaks"):
        run_ranks(2, "distributed_ranks:fail_in_rank_one", timeout=60)


@pytest.mark.processes
def test_a_rank_that_hangs_is_ended_and_named() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 still running after 4 s"):
        run_ranks(1, "distributed_ranks:hang", timeout=4)
