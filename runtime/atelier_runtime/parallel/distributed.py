"""The process group of a run: every process takes part, a single one too, so that nothing else asks whether there is one."""

import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from atelier_api.errors import ConfigError
from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.parallelism import DEEPSPEED

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the other ranks."""


@dataclass(frozen=True)
class Distributed:
    """This process among the others. `device` is where it trains."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def start(plan: ExecutionPlan, timeout: timedelta = TIMEOUT) -> Distributed:
    """Join the process group that torchrun's environment describes; without torchrun, a group of this process alone.

    Collectives of CPU tensors go through gloo, those of CUDA tensors through NCCL. Raises ConfigError where the plan wants a GPU and
    there is none for this process, or DeepSpeed where it is not installed, RuntimeError where the processes are not those of the plan.
    """
    if plan.strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"spec.parallelism.strategy is {plan.strategy}; needs the package deepspeed, which is not installed: "
            "install atelier-training with its extra `deepspeed`, or set another strategy"
        )
    launched = "RANK" in os.environ
    rank = int(os.environ["RANK"]) if launched else 0
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if world_size != plan.world_size:
        raise RuntimeError(f"{world_size} processes were started for a plan of {plan.world_size}")
    device = _device(plan, local_rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        rank=rank,
        world_size=world_size,
        store=None if launched else torch.distributed.HashStore(),  # type: ignore[attr-defined]
    )
    return Distributed(rank, local_rank, world_size, device)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(plan: ExecutionPlan, local_rank: int) -> torch.device:
    if plan.device == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ConfigError(
            f"spec.parallelism.gpusPerNode is {plan.processes_per_node} and this node has {found} GPUs; "
            "allowed is at most that number, or 0 to train on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
