"""What the ranks of the checkpoint tests do, each in a process of its own."""

import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from atelier_api.run_file import RunFile
from atelier_runtime.checkpoint import Checkpointer, WriterProcess, resume
from atelier_runtime.store import open_store
from checkpoint_runs import OneRank


def ranks() -> OneRank:
    """This rank's place; starts the process group."""
    dist.init_process_group("gloo")
    return OneRank(dist.get_rank(), dist.get_rank(), dist.get_world_size())


def ranks_with_writers(staging: Path) -> tuple[OneRank, WriterProcess]:
    """This rank's place and its writer, forked before there is anything else."""
    writer = WriterProcess(staging.parent)
    return ranks(), writer


def sharded_state(*, seed: int) -> dict[str, Any]:
    """An FSDP2 model with the state of its AdamW after a step, tensors that do not divide evenly, and whole ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 7)).square().mean().backward()
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    shared = torch.randn(6, 4)
    return {
        "step": seed,
        "weights": {name: parameter.detach() for parameter, name in names.items()},
        "optimizer": {name: dict(optimizer.state[parameter]) for parameter, name in names.items()},
        "one row": distribute_tensor(torch.randn(1, 3), mesh, [Shard(0)]),
        "columns": distribute_tensor(torch.randn(3, 5), mesh, [Shard(1)]),
        "replica": distribute_tensor(shared.clone(), mesh, [Replicate()]),
        "whole": {"large": shared, "small": torch.tensor(float(seed))},
        "plain": ["text", seed, None],
    }


def whole(state: Any) -> Any:
    """The state with every tensor gathered. Collective."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def save_twice(run_file: RunFile, staging: Path) -> list[Any]:
    """Save states of seeds 10 and 20 at those steps, and give them whole."""
    place, writer = ranks_with_writers(staging)
    checkpointer = Checkpointer(
        run_file, place, open_store(run_file.store_uri, run_file.spec.storage.s3), staging, writer=writer
    )
    saved = [_save(checkpointer, step, sharded_state(seed=step)) for step in (10, 20)]
    checkpointer.close()
    return saved


def change(run_file: RunFile, staging: Path) -> tuple[Any, Any, Any]:
    """Resume, add 1 to the weights, save as step 30. Gives the resume point and both states whole."""
    place, writer = ranks_with_writers(staging)
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    state = sharded_state(seed=999)
    point = resume(run_file, place, store, state, staging)
    seen = whole(state)
    changed = state | {"step": 30, "weights": {name: value + 1 for name, value in state["weights"].items()}}
    checkpointer = Checkpointer(run_file, place, store, staging, writer=writer)
    saved = _save(checkpointer, 30, changed)
    checkpointer.close()
    return point, seen, saved


def resume_together(run_file: RunFile, staging: Path) -> tuple[Any, Any]:
    """Resume into a state of other numbers; gives the resume point and the state, whole."""
    return _resume(run_file, staging, ranks())


def resume_in_three_ways(run_file: RunFile, staging: Path) -> list[tuple[Any, Any]]:
    """All ranks on one node; each on a node of its own; and so that rank 1's node reads a damaged file of step 30."""
    place = ranks()
    alone = dataclasses.replace(place, local_rank=0)
    own = staging / str(place.rank)
    damaged = "00000030" if place.rank == 1 else None
    return [
        _resume(run_file, staging, place),
        _resume(run_file, own, alone),
        _resume(run_file, own, alone, damaged=damaged),
    ]


def _save(checkpointer: Checkpointer, step: int, state: dict[str, Any]) -> Any:
    checkpointer.save(step, state)
    expected = whole(state)
    checkpointer.wait()
    assert [outcome.error for outcome in checkpointer.poll()] == [None]
    return expected


def _resume(run_file: RunFile, staging: Path, place: OneRank, *, damaged: str | None = None) -> tuple[Any, Any]:
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    if damaged is not None:
        real = store.get_file

        def get_file(key: str, path: Path, *, sha256: str | None = None, link: bool = False) -> None:
            wrong = damaged in key and key.endswith(".distcp")
            real(key, path, sha256="0" * 64 if wrong else sha256, link=link)

        store.get_file = get_file  # type: ignore[method-assign]
    state = sharded_state(seed=999)
    point = resume(run_file, place, store, state, staging)
    return point, whole(state)


def save_in_disorder(run_file: RunFile, staging: Path) -> list[int]:
    """Thirty saves without waiting, with pauses of its own on each rank; gives the steps that this rank saw committed."""
    place, writer = ranks_with_writers(staging)
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    checkpointer = Checkpointer(run_file, place, store, staging, writer=writer)
    draws = random.Random(place.rank)
    committed: list[int] = []
    weight = torch.zeros(100)
    for step in range(1, 31):
        weight += 1
        checkpointer.save(step, {"step": step, "weight": weight})
        for _ in range(draws.randrange(3)):
            time.sleep(draws.random() * 0.1)
            committed += [outcome.step for outcome in checkpointer.poll() if outcome.report]
    checkpointer.wait()
    committed += [outcome.step for outcome in checkpointer.poll() if outcome.report]
    checkpointer.close()
    return committed


def lose_a_writer(run_file: RunFile, staging: Path) -> str:
    """Rank 1's writer is killed; gives what each rank is told at its next saves."""
    place, writer = ranks_with_writers(staging)
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    checkpointer = Checkpointer(run_file, place, store, staging, writer=writer)
    checkpointer.save(1, {"weight": torch.ones(3)})
    checkpointer.wait()
    if place.rank == 1:
        checkpointer._process.kill()
    try:
        checkpointer.save(2, {"weight": torch.ones(3)})
        checkpointer.wait()
    except RuntimeError as error:
        checkpointer.close()
        return str(error)
    return ""


def without_credentials(run_file: RunFile, staging: Path) -> str:
    """Only rank 0 asks the store; gives the error that each rank raises."""
    place, writer = ranks_with_writers(staging)
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    try:
        Checkpointer(run_file, place, store, staging, writer=writer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
