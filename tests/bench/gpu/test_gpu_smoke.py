"""The benchmarks of a GPU run, on tiny networks without one. No figure of a GPU is asserted: there is none."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forked_script import run_script

MAIN = Path(__file__).parent / "main.py"

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "bench-gpu.json"
    assert run_script(MAIN, "--try-on-cpu", "--eager", "--out", str(out), timeout=600) == ""
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("id", ["G1", "G3"])
def test_ours_and_the_peer_train_the_same(document: dict[str, Any], id: str) -> None:
    (work,) = document["benchmarks"][id]
    ours, peer = (work["contestants"][name] for name in ("ours", "peer"))
    assert ours["steps"] == peer["steps"] == 3
    assert ours["mean_loss"] == pytest.approx(peer["mean_loss"], rel=0.1)
    # torch counts no operations of the CPU's attention.
    assert 0 < work["forward_tflop"] * 2 <= work["tflop_per_sample"] < work["forward_tflop"] * 3


def test_memory_is_predicted_for_every_workload_and_without_a_gpu_not_judged(document: dict[str, Any]) -> None:
    found = document["benchmarks"]["G11"]
    assert len(found) == 2
    assert all(one["predicted"] > 0 and not {"failed", "error"} & one.keys() for one in found)


def test_tiny_networks_meet_no_target(document: dict[str, Any]) -> None:
    assert len(document["rows"]) == 8
    assert all(row["standing"] == "" for row in document["rows"])


def test_the_gauge_is_asked_once_more_after_its_end_as_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(MAIN.parent)
    gauge = importlib.import_module("gauge")

    class Once(gauge.profile):
        """On a GPU a second end is an error."""

        ends = 0

        def __exit__(self, *error: Any) -> None:
            type(self).ends += 1
            super().__exit__(*error)

    monkeypatch.setattr(gauge, "profile", Once)
    asked = gauge.Gauge(torch.device("cpu"), warm=1, timed=2, profiled=1)
    assert [asked.stop_requested() for _ in range(6)] == [False, False, False, True, True, True]
    assert asked.reading().steps == 2
    assert Once.ends == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert "--try-on-cpu" in run_script(MAIN)
