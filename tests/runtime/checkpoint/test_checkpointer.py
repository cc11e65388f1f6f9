"""The checkpointer with its writer process."""

import gc
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from atelier_api.errors import CredentialsError, StoreError
from atelier_runtime.checkpoint import Checkpointer, WriterProcess
from atelier_runtime.store import open_store
from checkpoint_runs import OneRank, TinyRun, blank_state, state_of
from kills import acknowledge, acknowledged, in_fork, is_running, pauses, wait_until_gone
from s3_server import BUCKET, S3Server
from s3_settings import s3_settings

pytest_plugins = ("store_fixtures",)
processes = pytest.mark.processes


def open_checkpointer(run: TinyRun, **settings: Any) -> Checkpointer:
    writer = WriterProcess(run.staging.parent)
    return Checkpointer(run.run_file, OneRank(), run.store, run.staging, writer=writer, **settings)


@dataclass
class Serving:
    """A run whose writer serves several tests; each takes steps of its own."""

    run: TinyRun
    checkpointer: Checkpointer
    numbers: Iterator[int]

    def steps(self, count: int) -> list[int]:
        return [next(self.numbers) for _ in range(count)]

    def save(self, *steps: int) -> None:
        for step in steps:
            self.checkpointer.save(step, state_of(step))


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun.make(tmp_path)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    run = TinyRun.make(tmp_path_factory.mktemp("serving"), checkpoint={"keepLast": 2, "keepEvery": 3})
    checkpointer = open_checkpointer(run)
    yield Serving(run, checkpointer, itertools.count(1))
    checkpointer.close()
    checkpointer.close()  # a second time is no error
    assert checkpointer.poll() == []
    assert not is_running(checkpointer._process.pid)
    assert list(run.staging.iterdir()) == []


@processes
def test_a_save_is_committed_beside_the_training_and_reported_once(serving: Serving) -> None:
    checkpointer, (step,) = serving.checkpointer, serving.steps(1)
    assert checkpointer.poll() == []
    serving.save(step)
    checkpointer.wait()
    (outcome,) = checkpointer.poll()
    assert checkpointer.poll() == []
    assert outcome.report is not None
    assert outcome.report == checkpointer.latest_report
    assert outcome.report.manifest == f"manifests/{step:08d}-1.0.json"
    assert 0 < outcome.upload_seconds < outcome.save_seconds
    assert serving.run.resumed().step == step


@processes
def test_what_changes_after_save_returns_is_not_in_the_checkpoint(serving: Serving) -> None:
    (step,) = serving.steps(1)
    state = state_of(step)
    serving.checkpointer.save(step, state)
    for tensor in state["weights"].values():
        tensor.zero_()
    state["note"]["losses"].clear()
    state["step"] = 0
    serving.checkpointer.wait()
    serving.checkpointer.poll()
    assert serving.run.resumed().step == step


@processes
def test_a_waiting_save_is_replaced_by_a_newer_one(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "atelier_runtime")
    checkpointer, (first, second, third) = serving.checkpointer, serving.steps(3)
    checkpointer._process.send_signal(signal.SIGSTOP)
    serving.save(first, second, third)
    checkpointer._process.send_signal(signal.SIGCONT)
    checkpointer.wait()
    assert [outcome.step for outcome in checkpointer.poll()] == [first, third]
    (line,) = [record for record in caplog.records if record.message == "checkpoint dropped for a newer one"]
    assert (line.step, line.newer) == (second, third)  # type: ignore[attr-defined]
    assert serving.run.resumed().step == third
    serving.run.manifest(third).unlink()
    assert serving.run.resumed().step == first  # with its own numbers, not those of the saves that came while it waited


@processes
def test_only_as_many_checkpoints_stay_as_the_run_wants(serving: Serving) -> None:
    steps = serving.steps(4)
    for step in steps:
        serving.save(step)
        serving.checkpointer.wait()
    serving.checkpointer.poll()
    for folder in ("checkpoints", "manifests"):
        left = {int(path.name[:8]) for path in (serving.run.root / folder).iterdir()}
        assert {step for step in left if step % 3} == {step for step in steps[-2:] if step % 3}
        assert {step for step in steps if step % 3 == 0} <= left


@processes
def test_memory_stays_flat_over_twenty_five_saves(serving: Serving) -> None:
    checkpointer = serving.checkpointer
    state = {"weights": {str(index): torch.randn(1 << 16) for index in range(16)}}  # 4 MiB
    sizes: list[tuple[int, int]] = []
    files: list[tuple[int, int]] = []
    writer, own = psutil.Process(checkpointer._process.pid), psutil.Process()
    for step in serving.steps(25):
        checkpointer.save(step, state)
        checkpointer.wait()
        if len(sizes) in (4, 24):  # it takes a while after all that other tests have imported
            gc.collect()
        sizes.append((own.memory_info().rss, writer.memory_info().rss))
        files.append((own.num_fds(), writer.num_fds()))
    assert len(checkpointer.poll()) == 25
    for before, after in zip(sizes[4], sizes[-1], strict=True):
        assert after - before < 16 << 20, sizes
    assert files[4] == files[-1]


@processes
def test_signals_for_the_training_do_not_end_the_writer(serving: Serving) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        serving.checkpointer._process.send_signal(number)
    (step,) = serving.steps(1)
    serving.save(step)
    serving.checkpointer.wait()
    serving.checkpointer.poll()
    assert serving.run.resumed().step == step


@processes
def test_a_failed_save_is_reported_and_the_next_one_works(serving: Serving) -> None:
    checkpointer, root, (first, second) = serving.checkpointer, serving.run.root, serving.steps(2)
    (root / "checkpoints").rename(root / "elsewhere")
    (root / "checkpoints").write_bytes(b"in the way")
    serving.save(first)
    checkpointer.wait()
    (root / "checkpoints").unlink()
    (root / "elsewhere").rename(root / "checkpoints")
    serving.save(second)
    checkpointer.wait()
    failed, committed = checkpointer.poll()
    assert (failed.step, failed.report, failed.stage) == (first, None, "upload")
    assert isinstance(failed.error, StoreError)
    assert committed.report is not None
    assert serving.run.resumed().step == second


@processes
def test_a_writer_that_is_killed_ends_the_training(run: TinyRun) -> None:
    checkpointer = open_checkpointer(run)
    checkpointer.save(1, state_of(1))
    checkpointer._process.kill()
    with pytest.raises(RuntimeError, match="the checkpoint writer process is gone, exit code -9"):
        checkpointer.wait()
    with pytest.raises(RuntimeError, match="is gone"):
        checkpointer.save(2, state_of(2))
    checkpointer.close()


@processes
def test_the_writer_dies_with_its_trainer(run: TinyRun, tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def train() -> None:
        checkpointer = open_checkpointer(run)
        checkpointer.save(1, state_of(1))
        checkpointer.wait()
        acknowledge(note, checkpointer._process.pid)
        time.sleep(600)

    killer = threading.Thread(target=lambda: in_fork(train, kill_after=None), daemon=True)
    killer.start()
    while not acknowledged(note):
        time.sleep(0.05)
    (writer,) = acknowledged(note)
    assert is_running(writer)
    os.kill(psutil.Process(writer).ppid(), signal.SIGKILL)
    killer.join()
    wait_until_gone(writer)
    assert run.resumed().step == 1


@processes
def test_kills_of_trainer_and_writer_lose_nothing_that_was_acknowledged(run: TinyRun, tmp_path: Path) -> None:
    acks = tmp_path / "acks"

    def train() -> None:
        state = blank_state()
        point = run.resume(state)
        checkpointer = open_checkpointer(run)
        for step in range(point.step + 1 if point else 1, 1_000_000):
            checkpointer.save(step, state_of(step))
            for outcome in checkpointer.poll():
                assert outcome.report is not None
                acknowledge(acks, outcome.step)
            time.sleep(0.01)

    for pause in pauses(2, 0.2, 2, seed=int.from_bytes(os.urandom(4), "big")):
        before = len(acknowledged(acks))
        first_ack = partial(lambda count: len(acknowledged(acks)) > count, before)
        assert in_fork(train, kill_after=pause, counted_from=first_ack) == -9
        point = run.resume(blank_state())
        assert (point.step if point else 0) >= max(acknowledged(acks), default=0)
        assert point is None or point.refused == ()
    assert run.resumed().step >= max(acknowledged(acks), default=1)


@processes
def test_a_restart_writes_under_a_number_of_its_own(run: TinyRun) -> None:
    """The same step twice, as after a resume from before it: no checkpoint is overwritten."""
    run.claim().save(10)
    checkpointer = open_checkpointer(run)
    assert checkpointer.attempt == "1.1"
    checkpointer.save(10, state_of(10))
    checkpointer.wait()
    checkpointer.close()
    assert [info.key for info in run.store.list("manifests/")] == [
        "manifests/00000010-1.0.json",
        "manifests/00000010-1.1.json",
    ]


@processes
def test_the_writer_uses_the_same_s3_store(s3_tls_server: S3Server, tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in s3_tls_server.environment.items():
        monkeypatch.setenv(name, value)
    s3 = s3_settings(s3_tls_server).model_dump(by_alias=True)
    run = TinyRun.make(tmp_path, uri=f"s3://{BUCKET}/writer", s3=s3)
    run.store = open_store(run.run_file.store_uri, run.run_file.spec.storage.s3)
    seen: list[str] = []

    class Observer:
        def storage_request(self, operation: str, code: str, seconds: float) -> None:
            seen.append(f"{operation} {code}")

        def storage_retry(self, reason: str) -> None:
            seen.append(reason)

    checkpointer = open_checkpointer(run, observer=Observer())
    checkpointer.save(10, state_of(10))
    checkpointer.wait()
    checkpointer.close()
    assert run.resumed().step == 10
    assert "UploadFile ok" in seen


@processes
def test_refused_credentials_are_told_before_training(
    s3_environment: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    run = TinyRun.make(tmp_path, open_store(f"s3://{BUCKET}/refused", s3_settings(s3_environment)))
    with pytest.raises(CredentialsError, match="SignatureDoesNotMatch"):
        open_checkpointer(run)
