"""Checkpoints of a tiny state, written without the writer process where a test is not about it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint import ResumePoint, SaveOutcome, resume
from atelier_runtime.checkpoint.attempts import claim_attempt
from atelier_runtime.checkpoint.messages import Save, WriterSettings
from atelier_runtime.checkpoint.ranks import Group
from atelier_runtime.checkpoint.saving import Saver
from atelier_runtime.checkpoint.snapshot import SnapshotFacts
from atelier_runtime.store import LocalStore, Store
from run_files import run_file

TENSORS = 4
NUMBERS = 1_000


@dataclass(frozen=True)
class OneRank:
    """A run of one process, without a process group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def state_of(step: int, *, seed: int = 0) -> dict[str, Any]:
    """A state whose every number is a function of the step."""
    generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
    names = [f"block.{index}.weight" for index in range(TENSORS)]
    return {
        "step": step,
        "weights": {name: torch.randn(NUMBERS, generator=generator) for name in names},
        "optimizer": {
            name: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(NUMBERS, generator=generator)}
            for name in names
        },
        "note": {"losses": [0.5, step], "name": "tiny"},
    }


def blank_state() -> dict[str, Any]:
    """The shape of `state_of`, with other numbers."""
    return state_of(0, seed=99)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@dataclass
class TinyRun:
    """A run with a store, whose saves are written in this process."""

    run_file: RunFile
    store: Store
    staging: Path
    attempt: str = "1.0"

    @classmethod
    def make(cls, folder: Path, store: Store | None = None, **storage: Any) -> "TinyRun":
        """A run below `folder`; `storage` lays over the defaults of `spec.storage`."""
        (folder / "base").mkdir(parents=True, exist_ok=True)
        spec = {"storage": {"uri": str(folder / "store"), **storage}}
        made = run_file(folder, **spec).model_copy(update={"model_folder": str(folder / "base")})
        return cls(made, store or LocalStore(Path(made.store_uri)), folder / "staging")

    @property
    def root(self) -> Path:
        """Where a local store keeps the run's objects."""
        return Path(self.store.uri)

    def claim(self) -> "TinyRun":
        """Take the next attempt."""
        self.attempt = claim_attempt(self.store, self.run_file.attempt)
        return self

    def saver(self, store: Store | None = None) -> Saver:
        """What the writer process of a run with one rank runs."""
        settings = WriterSettings(
            run_file=self.run_file,
            attempt=self.attempt,
            rank=0,
            world_size=1,
            ranks_on_node=1,
            staging=self.staging,
            store_uri=self.store.uri,
            conditional_writes="enforced",
            compare_etag=False,
            capabilities={"conditional_write": "enforced"},
            dataset_hash="d" * 64,
            rendezvous=None,
            observed=False,
        )
        saver = Saver(settings, Group(0, 1), store or self.store)
        saver.describe_base()
        return saver

    def try_save(self, step: int, *, saver: Saver | None = None, state: dict[str, Any] | None = None) -> SaveOutcome:
        """Write one save, without collecting garbage."""
        save = Save(step, 0, SnapshotFacts(0, 1_000, 0, sharded=False), time.monotonic())
        return (saver or self.saver()).save(save, state or state_of(step), lambda _: None)

    def save(self, *steps: int) -> None:
        """Commit a checkpoint of each step."""
        for step in steps:
            outcome = self.try_save(step)
            assert outcome.report is not None, outcome

    def resume(self, state: dict[str, Any]) -> ResumePoint | None:
        return resume(self.run_file, OneRank(), self.store, state, self.staging)

    def resumed(self) -> ResumePoint:
        """Resume, and check that what was loaded is exactly what was saved at that step."""
        state = blank_state()
        point = self.resume(state)
        assert point is not None
        assert same(state, state_of(point.step))
        return point

    def files(self, step: int) -> dict[str, Path]:
        """The files of a step's checkpoint in a local store, by name."""
        (folder,) = (self.root / "checkpoints").glob(f"{step:08d}-*")
        return {path.name: path for path in folder.iterdir() if path.is_file()}

    def manifest(self, step: int) -> Path:
        (path,) = (self.root / "manifests").glob(f"{step:08d}-*.json")
        return path
