"""Kernels that are known to fail are not chosen."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from atelier_api.exit_codes import ExitCode
from atelier_api.run_file import ExecutionPlan
from atelier_runtime import launch
from atelier_runtime.kernels import choose_adapters, choose_attention
from run_files import run_file


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_attention_is_kept_from_cudnn_and_not_from_flash() -> None:
    choose_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(("given", "expected"), [(None, "torch"), ("triton", "triton")])
def test_adapters_compute_with_torchs_own_operations_unless_others_are_named(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LYCORIS_KERNEL_BACKEND", raising=False)
    if given is not None:
        monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", given)
    choose_adapters()
    assert os.environ["LYCORIS_KERNEL_BACKEND"] == expected


def test_a_rank_has_chosen_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []

    def begin(_plan: ExecutionPlan) -> None:
        chosen.append(not torch.backends.cuda.cudnn_sdp_enabled())
        raise launch.StopRequested

    file = tmp_path / "run.json"
    run_file(tmp_path).write(file)
    monkeypatch.setattr(sys, "argv", ["launch", "--run-file", str(file)])
    monkeypatch.setattr(launch.parallel, "start", begin)
    for process_wide in ("setup_logging", "quiet_libraries"):
        monkeypatch.setattr(launch, process_wide, lambda **_: None)
    monkeypatch.setattr(launch.torch, "set_num_threads", lambda _: None)
    monkeypatch.delenv("LYCORIS_KERNEL_BACKEND", raising=False)
    monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", "torch")  # so that what the rank sets is undone
    assert launch.main() == ExitCode.STOPPED
    assert chosen == [True]
