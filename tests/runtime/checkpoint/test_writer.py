"""The writer process, and the writers of several ranks among themselves."""

import os
import sys
import threading
import time
from ipaddress import ip_address
from pathlib import Path
from queue import Queue
from typing import Any, cast

import psutil
import pytest

from atelier_runtime import parallel
from atelier_runtime.checkpoint import WriterProcess
from atelier_runtime.checkpoint.messages import Save, Superseded
from atelier_runtime.checkpoint.ranks import Group
from atelier_runtime.checkpoint.save import rendezvous
from atelier_runtime.checkpoint.snapshot import SnapshotFacts
from atelier_runtime.checkpoint.writer import Writer
from kills import acknowledge, acknowledged, in_fork, wait_until_gone
from run_files import run_file

processes = pytest.mark.processes


@processes
def test_a_writer_that_has_nothing_to_write_ends_with_its_trainer(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = in_fork(lambda: acknowledge(note, WriterProcess(tmp_path).process.pid), kill_after=None)
    assert code == 0
    (writer,) = acknowledged(note)
    wait_until_gone(writer)


@processes
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process keeps its name")
def test_a_writer_has_a_name_and_a_session_of_its_own(tmp_path: Path) -> None:
    writer = WriterProcess(tmp_path)
    while (name := writer.process.name()) != "atelier-writer":
        assert name == psutil.Process().name()  # it has just been forked
        time.sleep(0.01)
    assert os.getsid(writer.process.pid) == writer.process.pid
    writer.pipe.close()
    assert writer.process.wait(60) == 0


def test_a_writer_is_not_forked_beside_a_process_group(tmp_path: Path) -> None:
    parallel.start(run_file(tmp_path).plan)
    try:
        with pytest.raises(RuntimeError, match="forked before the process group"):
            WriterProcess(tmp_path)
    finally:
        parallel.stop()


class _TwoRanks:
    """A group of two threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._values: dict[int, int] = {}

    def of(self, rank: int) -> Any:
        group = self

        class Place:
            def gather(self, value: int) -> list[int]:
                group._values[rank] = value
                group._barrier.wait(10)
                values = [group._values[0], group._values[1]]
                group._barrier.wait(10)
                return values

        return Place()


class _Trainer:
    """Gives its writer the next of its saves whenever the writer says that the one before is superseded."""

    def __init__(self, steps: list[int]) -> None:
        self.saves: Queue[Save] = Queue()
        self._steps = iter(steps)
        self.told: list[int] = []
        self.first = self.next()

    def next(self) -> Save:
        return Save(next(self._steps), 0, SnapshotFacts(0, 0, 0, sharded=False), 0.0)

    def send(self, message: object) -> None:
        assert isinstance(message, Superseded)
        self.told.append(message.step)
        self.saves.put(self.next())


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [([20], [20], 20), ([20, 30], [30], 30), ([30], [20, 30], 30), ([20, 40], [30, 40], 40), ([20, 30, 40], [40], 40)],
)
def test_writers_that_were_given_different_saves_agree_on_the_newest(
    first: list[int], second: list[int], agreed: int
) -> None:
    group = _TwoRanks()
    trainers = [_Trainer(first), _Trainer(second)]
    chosen: dict[int, int] = {}

    def agree(rank: int) -> None:
        trainer = trainers[rank]
        writer = Writer(trainer, [], trainer.saves)  # type: ignore[arg-type]
        chosen[rank] = writer._agree(group.of(rank), trainer.first).step

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert chosen == {0: agreed, 1: agreed}
    assert [trainer.told for trainer in trainers] == [first[:-1], second[:-1]]


def test_writers_are_told_an_address_and_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a pod is gone while the pod still commits its last checkpoint."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    group = _TwoNodes()
    store, address = rendezvous(cast(Group, group), nodes=[0, 1])
    assert store is not None
    assert address is not None
    assert (ip_address(address[0]).is_loopback, address[1]) == (True, store.port)


class _TwoNodes:
    """Rank 0's view of two ranks on two nodes."""

    rank, world_size = 0, 2

    def gather(self, value: Any) -> list[Any]:
        return [value, None]
