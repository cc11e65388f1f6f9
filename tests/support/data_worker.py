"""One rank that builds a data set and reads two epochs of it, for tests to run in processes of their own."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from atelier_api.run_file import RunFile
from atelier_runtime import components
from atelier_runtime.data import Loader, build, build_dataset
from atelier_runtime.data.encode import Limits
from atelier_runtime.family import Latents
from tiny_data import CountingFamily, OneRank


@dataclass(frozen=True)
class Mischief:
    """What is to go wrong: the process kills itself after so many pictures; a rank's autoencoder fails; a rank is asked to stop."""

    kill_after: int = sys.maxsize
    fail_rank: int | None = None
    stop_rank: int | None = None
    cache_per_rank: bool = False


class StopAsked(Exception):
    """What a report raises to end the build."""


class DoomedFamily(CountingFamily):
    """Kills its process after so many pictures, or fails at the first."""

    def __init__(self, kill_after: int, *, fails: bool) -> None:
        super().__init__()
        self.kill_after = kill_after
        self.fails = fails

    def encode_pixels(self, pipe: Any, pixels: Tensor) -> Latents:
        if self.fails:
            raise ArithmeticError("the autoencoder fails")
        if self.pictures >= self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_pixels(pipe, pixels)


def main(run_path: Path, rank: int, world_size: int, mischief: Mischief) -> None:
    """Writes what it did as `<rank>.json` beside the run file."""
    out = run_path.parent / f"{rank}.json"
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{run_path}.rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
    build.Limits = lambda: Limits(batch_samples=1, round_samples=2, shard_bytes=1)  # type: ignore[assignment, attr-defined, misc]
    loads = []
    load = components.load_encoders
    components.load_encoders = lambda *arguments: loads.append(1) or load(*arguments)  # type: ignore[func-returns-value]
    family = DoomedFamily(mischief.kill_after, fails=rank == mischief.fail_rank)
    run_file = RunFile.read(run_path)
    if mischief.cache_per_rank:
        run_file = run_file.model_copy(update={"cache_uri": f"{run_file.cache_uri}-{rank}"})

    def report(stage: str, detail: str, done: int, total: int) -> None:
        if rank == mischief.stop_rank and stage == "encoding pictures" and done > 0:
            raise StopAsked

    try:
        dataset = build_dataset(run_file, family, OneRank(rank, world_size), report)
    except Exception as error:
        out.write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return
    loader = Loader(dataset, rank=rank, world_size=world_size, micro_batch_size=1, start_step=0)
    steps = [next(loader) for _ in range(2 * dataset.order.steps_per_epoch)]
    loader.close()
    result = {
        "hash": dataset.hash,
        "loads": len(loads),
        "pictures": family.pictures,
        "captions": len(family.captions),
        "funnel": dataset.funnel.model_dump(),
        "steps": [
            [
                [batch.names[0], batch.slots[0], float(batch.weights[0]), float(batch.latents.double().sum())]
                for batch in batches
            ]
            for _, batches in steps
        ],
    }
    out.write_text(json.dumps(result))
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
