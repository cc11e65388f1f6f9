"""C4: how long training waits for a checkpoint, and how much slower its steps are while one is written.

The state is fp32 tensors of 4 MiB. Blocked time: `Checkpointer.save`, `torch.distributed.checkpoint.async_save` and a copy into
memory that is there already (the least that any save can do), each against a synchronous `torch.save` of the same state to the same
disk, in turns. `torch.save` returns when the system has the bytes; `with fsync`, when the disk has them, which is what our manifest
vouches for. What a save leaves running is waited for between turns, outside the measured time. Step times: a bare pass of the demo's
network while a save is being written, against the same pass right before, with nothing being written.
"""

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from bench_run import bench_run, bench_run_file, plan
from pairs import Columns, Findings, Ratio, Row, Turns, at_most, ratio
from peer_loop import BareLoop
from torch import Tensor

from atelier_runtime.checkpoint import Checkpointer
from atelier_runtime.store import open_store
from sessions import alone

TENSOR_BYTES = 4 << 20
ALONE_STEPS = 30
MOST_STEPS = 2000
State = dict[str, Any]


def build_state(mebibytes: int) -> State:
    """A flat state of that size."""
    count = max(1, (mebibytes << 20) // TENSOR_BYTES)
    tensors = {f"block.{number}.weight": torch.randn(TENSOR_BYTES // 4) for number in range(count)}
    return {"step": 0, "weights": tensors}


def state_bytes(state: State) -> int:
    tensors: dict[str, Tensor] = state["weights"]
    return sum(tensor.nbytes for tensor in tensors.values())


class OurSave:
    """The run's checkpointer with a store on the same disk."""

    def __init__(self, folder: Path) -> None:
        run_file = bench_run_file(folder)
        store = open_store(run_file.store_uri, run_file.spec.storage.s3)
        distributed, writer = alone(plan(1), folder)
        self._checkpointer = Checkpointer(run_file, distributed, store, folder / "staging", writer=writer)
        self._step = 0

    def save(self, state: State) -> None:
        self._step += 1
        self._checkpointer.save(self._step, state)

    def is_done(self) -> bool:
        outcomes = self._checkpointer.poll()
        for outcome in outcomes:
            if outcome.report is None:
                raise RuntimeError(f"the save of step {outcome.step} failed") from outcome.error
        return bool(outcomes)

    def wait(self) -> None:
        self._checkpointer.wait()
        self.is_done()

    def close(self) -> None:
        self._checkpointer.close()


class AsyncSave:
    """torch's own: a copy in this process, written by a thread of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "dcp"
        self._future: Any = None

    def save(self, state: State) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(self._folder))

    def is_done(self) -> bool:
        return bool(self._future.done())

    def wait(self) -> None:
        self._future.result()


class SyncSave:
    """`torch.save`, which is done when it returns."""

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self._path = folder / "state.pt"
        self._fsync = fsync

    def save(self, state: State) -> None:
        with self._path.open("wb") as file:
            torch.save(state, file)
            if self._fsync:
                file.flush()
                os.fsync(file.fileno())

    def wait(self) -> None:
        """What the disk still lacks of it must not slow the next turn."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


class Copy:
    """A copy in memory."""

    def __init__(self, state: State) -> None:
        self._targets = [tensor.clone() for tensor in state["weights"].values()]

    def save(self, state: State) -> None:
        for target, tensor in zip(self._targets, state["weights"].values(), strict=True):
            target.copy_(tensor)

    def wait(self) -> None:
        """Nothing is left to wait for."""


def measure(folder: Path, *, mebibytes: int, pairs: int, step_pairs: int) -> dict[str, Any]:
    """Everything raw."""
    run = bench_run(folder, batch_size=1, steps=1)
    run.parts.checkpointer.close()
    step = BareLoop(run.parts).step
    state, ours = build_state(mebibytes), OurSave(folder)
    contestants = {
        "ours": ours,
        "async_save": AsyncSave(folder),
        "a copy alone": Copy(state),
        "torch.save": SyncSave(folder),
        "torch.save with fsync": SyncSave(folder, fsync=True),
    }
    try:
        started = time.perf_counter()
        ours.save(state)
        first_seconds = time.perf_counter() - started
        ours.wait()
        blocked, io = _blocked(contestants, state, pairs)
        inflation = {name: _inflation(contestants[name], state, step, step_pairs) for name in ("ours", "async_save")}
    finally:
        ours.close()
    return {
        "state_bytes": state_bytes(state),
        "first_save_seconds": first_seconds,
        "blocked": {name: turns.columns() for name, turns in blocked.items()},
        "trainer_per_save": io,
        "step_seconds": inflation,
    }


def _blocked(
    contestants: dict[str, Any], state: State, pairs: int
) -> tuple[dict[str, Turns], dict[str, dict[str, float]]]:
    """Seconds that `save` takes, and what this process wrote and faulted in it (medians)."""
    blocked = {name: Turns() for name in contestants}
    io: dict[str, list[tuple[int, int]]] = {name: [] for name in contestants}
    for _ in range(pairs):
        for name, contestant in contestants.items():
            before = _io()
            with blocked[name]:
                contestant.save(state)
            io[name].append((_io()[0] - before[0], _io()[1] - before[1]))
            contestant.wait()
    medians = {
        name: {
            "written_bytes": float(statistics.median(written for written, _ in values)),
            "page_faults": float(statistics.median(faults for _, faults in values)),
        }
        for name, values in io.items()
    }
    return blocked, medians


def _io() -> tuple[int, int]:
    """(bytes this process has written, its page faults)."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"]), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _inflation(contestant: Any, state: State, step: Callable[[], None], pairs: int) -> dict[str, list[Columns]]:
    """Step times per pair: alone, and while a save is being written."""
    result: dict[str, list[Columns]] = {"alone": [], "during": []}
    for _ in range(pairs):
        alone, during = Turns(), Turns()
        for _ in range(ALONE_STEPS):
            with alone:
                step()
        contestant.save(state)
        while not contestant.is_done() and len(during.wall) < MOST_STEPS:
            with during:
                step()
        contestant.wait()
        if during.wall:
            result["alone"].append(alone.columns())
            result["during"].append(during.columns())
    return result


def _inflated(seconds: dict[str, list[Columns]], kind: str, middle: Callable[[list[float]], float]) -> Ratio:
    during, alone = ([middle(columns[kind]) for columns in seconds[when]] for when in ("during", "alone"))
    return ratio(during, alone)


def rows(raw: dict[str, Any]) -> list[Row]:
    """What `measure` found, for the table."""
    seconds = {name: columns["wall_seconds"] for name, columns in raw["blocked"].items()}
    size = f"{raw['state_bytes'] >> 20} MiB"
    found = []
    for name in ("ours", "async_save", "a copy alone"):
        for against in ("torch.save", "torch.save with fsync"):
            share = ratio(seconds[name], seconds[against])
            goal = at_most(share.median, 0.05, "0.05") if name == "ours" else ()
            found.append(Row("C4", f"blocked / {against}, {name}, {size}", str(share), *goal))
    for name, values in seconds.items():
        found.append(Row("C4", f"blocked, {name}, {size}", f"{1e3 * statistics.median(values):.0f} ms"))
    found.append(Row("C4", f"blocked, first save of ours, {size}", f"{1e3 * raw['first_save_seconds']:.0f} ms"))
    for name, step_seconds in raw["step_seconds"].items():
        for kind, label in (("thread_seconds", "CPU of the thread"), ("wall_seconds", "wall")):
            median = _inflated(step_seconds, kind, statistics.median)
            goal = at_most(median.median, 1.03, "1.03", excess=True) if name == "ours" else ()
            found.append(Row("C4", f"median step during a save / alone, {name}, {label}", str(median), *goal))
        mean = _inflated(step_seconds, "wall_seconds", statistics.fmean)
        found.append(Row("C4", f"mean step during a save / alone, {name}, wall", str(mean)))
    for name, io in raw["trainer_per_save"].items():
        measured = f"{io['written_bytes'] / raw['state_bytes']:.4f} of the state, {io['page_faults']:.0f} page faults"
        found.append(Row("C4", f"written by the trainer inside save, {name}", measured))
    return found


def run(*, quick: bool, mebibytes: int) -> Findings:
    """With a state of `mebibytes`; of 16 MiB at most when quick."""
    with tempfile.TemporaryDirectory(prefix="atelier-bench-") as folder:
        if quick:
            raw = measure(Path(folder), mebibytes=min(16, mebibytes), pairs=3, step_pairs=2)
        else:
            raw = measure(Path(folder), mebibytes=mebibytes, pairs=9, step_pairs=5)
    return Findings(rows(raw), raw)
