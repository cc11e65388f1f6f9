"""What is counted: names, labels, states of time, and the files that the agent reads."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from atelier_api.errors import StoreError
from atelier_runtime.observe.exposition import NodeCollector
from atelier_runtime.observe.metric_table import GOODPUT_STATES, METRICS, PHASES, STEP_SECONDS, STORAGE_SECONDS
from atelier_runtime.observe.metrics import RECOVER_UNTIL, STARTED_AT, TrainMetrics, reserve_files


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def series(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Every sample as (name, label values …), the values in the order of the labels' names."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_buckets_never_change() -> None:
    assert STEP_SECONDS == (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
    assert STORAGE_SECONDS == (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@pytest.mark.parametrize("facts", METRICS.values(), ids=METRICS)
def test_every_row_follows_the_naming_rules(facts) -> None:  # type: ignore[no-untyped-def]
    assert facts.help.endswith(".")
    assert facts.name.endswith("_total") == (facts.kind == "counter")
    assert bool(facts.buckets) == (facts.kind == "histogram")
    assert "rank" not in facts.labels or facts.kind != "histogram", "a histogram by rank has too many series"
    assert not set(facts.labels) & {"run", "namespace", "pod", "step"}


def test_a_gauge_is_absent_until_it_is_known() -> None:
    metrics = TrainMetrics(0)
    assert not [
        name
        for name in series(metrics.registry)
        if name[0] in ("atelier_train_loss", "atelier_checkpoint_last_success_step")
    ]
    metrics.numbers(loss=0.25, gradient_norm=None, learning_rate=1e-4)
    known = series(metrics.registry)
    assert known["atelier_train_loss",] == 0.25
    assert known["atelier_train_learning_rate", "0"] == 1e-4
    assert ("atelier_train_grad_norm",) not in known


def test_rare_events_start_at_zero_so_that_the_first_is_seen() -> None:
    metrics = TrainMetrics(0)
    assert series(metrics.registry)["atelier_train_nonfinite_total",] == 0
    metrics.nonfinite()
    metrics.checkpoint_verify_failed()
    known = series(metrics.registry)
    assert known["atelier_train_nonfinite_total",] == 1
    assert known["atelier_checkpoint_verify_failures_total",] == 1
    assert known["atelier_checkpoint_failures_total", "StoreUnreachable", "upload"] == 0


def test_a_step_counts_samples_pixels_and_its_phases_once() -> None:
    clock = Clock()
    metrics = TrainMetrics(0, clock=clock)
    for seconds in (0.2, 0.3):  # two accumulation steps are one forward time
        with metrics.phase("forward"):
            clock.now += seconds
    metrics.step_finished(1, samples=8, pixels=100)
    metrics.step_finished(2, samples=8, pixels=100)
    known = series(metrics.registry)
    assert known["atelier_train_step",] == 2
    assert known["atelier_train_steps_total",] == 2
    assert known["atelier_train_samples_total",] == 16
    assert known["atelier_train_pixels_total",] == 200
    assert known["atelier_train_step_duration_seconds_sum", "forward"] == pytest.approx(0.5)
    assert known["atelier_train_step_duration_seconds_count", "forward"] == 1
    assert abs(known["atelier_train_last_step_timestamp_seconds",] - time.time()) < 60


def goodput(metrics: TrainMetrics) -> dict[str, float]:
    known = series(metrics.registry)
    return {key[1]: value for key, value in known.items() if key[0] == "atelier_train_goodput_seconds_total"}


def test_every_second_belongs_to_one_state() -> None:
    clock = Clock()
    metrics = TrainMetrics(0, age_seconds=4, clock=clock)
    clock.now = 6
    metrics.step_finished(1, samples=1, pixels=1)
    clock.now = 9
    metrics.step_finished(2, samples=1, pixels=1)
    clock.now = 10
    with metrics.checkpoint_stall():
        clock.now = 12
    with metrics.sampling():
        clock.now = 17
    clock.now = 18
    metrics.step_finished(3, samples=1, pixels=1)
    clock.now = 18 + 400
    metrics.step_finished(4, samples=1, pixels=1)
    assert goodput(metrics) == {"startup": 10, "productive": 3 + 1 + 1, "checkpoint": 2, "sampling": 5, "stalled": 400}
    assert sum(goodput(metrics).values()) == 4 + clock.now
    assert set(goodput(metrics)) < set(GOODPUT_STATES)
    assert series(metrics.registry)["atelier_checkpoint_save_stall_seconds_sum",] == 2


def test_repeated_steps_are_recovery() -> None:
    clock = Clock()
    metrics = TrainMetrics(0, recover_until=2, clock=clock)
    for step in (1, 2, 3):
        clock.now += 5
        metrics.step_finished(step, samples=1, pixels=1)
    assert goodput(metrics) == {"recovery": 10, "productive": 5}


def test_checkpoints_are_counted_and_their_lag_grows_with_the_steps() -> None:
    metrics = TrainMetrics(0)
    metrics.checkpoint_restored(5, 1.5)
    metrics.checkpoint_finished(10, size_bytes=2000, save_seconds=0.2, upload_seconds=3.0)
    metrics.step_finished(12, samples=1, pixels=1)
    metrics.checkpoint_failed("upload", StoreError("no answer"))
    metrics.checkpoint_interval(60.0)
    metrics.preemption_committed(7.0)
    known = series(metrics.registry)
    assert known["atelier_checkpoint_last_success_step",] == 10
    assert known["atelier_checkpoint_lag_steps",] == 2
    assert known["atelier_checkpoint_bytes",] == 2000
    assert known["atelier_checkpoint_upload_bytes_total",] == 2000
    assert known["atelier_checkpoint_upload_seconds_sum",] == 3.0
    assert known["atelier_checkpoint_save_seconds_sum",] == 0.2
    assert known["atelier_checkpoint_restore_seconds_sum",] == 1.5
    assert known["atelier_checkpoint_preemption_commit_seconds_sum",] == 7.0
    assert known["atelier_checkpoint_interval_seconds",] == 60.0
    assert known["atelier_checkpoint_failures_total", "StoreUnreachable", "upload"] == 1


def test_other_ranks_feed_only_the_rows_with_a_rank() -> None:
    metrics = TrainMetrics(5)
    with metrics.phase("data"), metrics.checkpoint_stall(), metrics.sampling():
        pass
    metrics.step_finished(1, samples=1, pixels=1)
    metrics.numbers(loss=1.0, gradient_norm=1.0, learning_rate=1.0)
    metrics.nonfinite()
    metrics.checkpoint_finished(1, size_bytes=1, save_seconds=1, upload_seconds=1)
    metrics.checkpoint_failed("save", ValueError())
    metrics.data_waited(2.0)
    metrics.data_waited(3.5)
    metrics.memory(allocated_bytes=10, reserved_bytes=20, alloc_retries=1, ooms=0)
    assert series(metrics.registry) == {
        ("atelier_dataloader_wait_seconds_total", "5"): 3.5,
        ("atelier_gpu_memory_allocated_bytes", "5"): 10,
        ("atelier_gpu_memory_reserved_bytes", "5"): 20,
        ("atelier_gpu_alloc_retries_total", "5"): 1,
        ("atelier_gpu_ooms_total", "5"): 0,
    }


def test_a_step_costs_little() -> None:
    metrics = TrainMetrics(0)
    calls = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def step() -> None:
        for phase in PHASES:
            with metrics.phase(phase):
                pass
        metrics.step_finished(1, samples=1, pixels=1)

    step()
    sys.setprofile(profile)
    step()
    sys.setprofile(None)
    assert calls < 400, "each call is some 50 ns; a step must stay far below its own time"


CHILD = """
import os, sys
from atelier_runtime.observe.metrics import TrainMetrics
rank = int(sys.argv[1])
metrics = TrainMetrics.from_environment(rank, os.environ)
with metrics.phase("forward"):
    pass
metrics.step_finished(7, samples=4, pixels=64)
metrics.numbers(loss=0.5, gradient_norm=1.0, learning_rate=1e-4, techniques={"layerSync": -0.1})
metrics.data_waited(1.5)
metrics.memory(allocated_bytes=1, reserved_bytes=2)
with metrics.checkpoint_stall():
    pass
metrics.checkpoint_restored(1, 1.0)
metrics.checkpoint_interval(1.0)
metrics.preemption_committed(1.0)
for phase in ("data", "forward", "backward", "optimizer", "sync"):
    metrics._phase_seconds[phase] = 0.1
metrics.step_finished(8, samples=4, pixels=64)
metrics.checkpoint_finished(8, size_bytes=1, save_seconds=1, upload_seconds=1)
for operation in ("put", "get", "head", "list", "delete"):
    for code in ("200", "404", "503"):
        metrics.storage_request(operation, code, 0.1)
metrics.storage_retry("SlowDown")
"""


@pytest.fixture(scope="module")
def fed_by_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    environment = {
        **os.environ,
        "PROMETHEUS_MULTIPROC_DIR": str(folder),
        STARTED_AT: str(time.time() - 30),
        RECOVER_UNTIL: "0",
    }
    for rank in ("0", "1"):
        subprocess.run([sys.executable, "-c", CHILD, rank], env=environment, check=True)
    return folder


def _scrape(folder: Path) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(NodeCollector(folder, {"run": "demo", "namespace": "team"}))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    result = {}
    for family in families:
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("run"), labels.pop("namespace")) == ("demo", "team")
            result[sample.name, json.dumps(labels, sort_keys=True)] = sample.value
    return result


def test_the_agent_merges_the_files_of_ended_ranks(fed_by_two_ranks: Path) -> None:
    known = _scrape(fed_by_two_ranks)
    assert known["atelier_train_step", "{}"] == 8
    assert known["atelier_train_steps_total", "{}"] == 2
    assert known["atelier_dataloader_wait_seconds_total", '{"rank": "0"}'] == 1.5
    assert known["atelier_dataloader_wait_seconds_total", '{"rank": "1"}'] == 1.5
    assert known["atelier_train_goodput_seconds_total", '{"state": "startup"}'] >= 30
    assert known["atelier_staging_free_bytes", "{}"] > 0
    assert not [name for name, _ in known if name.endswith("_created")]


def test_a_scrape_shows_every_row_of_the_table(fed_by_two_ranks: Path) -> None:
    names = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count").removeprefix("atelier_")
        for name, _ in _scrape(fed_by_two_ranks)
    }
    assert names == set(METRICS)


def test_a_run_stays_within_its_budget_of_series(fed_by_two_ranks: Path) -> None:
    assert len(_scrape(fed_by_two_ranks)) <= 300 + 6 * 2


def test_the_space_of_the_files_is_taken_before_they_are_mapped(tmp_path: Path) -> None:
    reserve_files(tmp_path)
    sizes = {path.name.removesuffix(f"_{os.getpid()}.db"): path.stat().st_blocks * 512 for path in tmp_path.iterdir()}
    assert set(sizes) == {"counter", "histogram", "gauge_mostrecent"}
    assert min(sizes.values()) >= 1 << 17


def test_the_reserved_files_are_the_ones_that_are_used(fed_by_two_ranks: Path) -> None:
    assert {path.stat().st_size for path in fed_by_two_ranks.iterdir()} == {1 << 17}
