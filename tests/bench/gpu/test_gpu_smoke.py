"""The benchmarks of a GPU run, on tiny networks without one. No figure of a GPU is asserted: there is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

MAIN = Path(__file__).parent / "main.py"

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "bench-gpu.json"
    command = [sys.executable, str(MAIN), "--try-on-cpu", "--eager", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("id", ["G1", "G3"])
def test_ours_and_the_peer_train_the_same(document: dict[str, Any], id: str) -> None:
    (work,) = document["benchmarks"][id]
    ours, peer = (work["contestants"][name] for name in ("ours", "peer"))
    assert ours["steps"] == peer["steps"] == 3
    assert ours["mean_loss"] == pytest.approx(peer["mean_loss"], rel=0.1)
    # torch counts no operations of the CPU's attention.
    assert 0 < work["forward_tflop"] * 2 <= work["tflop_per_sample"] < work["forward_tflop"] * 3


def test_memory_is_predicted_for_every_workload(document: dict[str, Any]) -> None:
    found = document["benchmarks"]["G11"]
    assert len(found) == 2
    assert all(one["predicted"] > 0 and "failed" not in one for one in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    ended = subprocess.run([sys.executable, str(MAIN)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "--try-on-cpu" in ended.stderr
