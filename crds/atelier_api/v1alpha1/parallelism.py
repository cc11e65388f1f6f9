"""`spec.parallelism`: how many processes, and how the model is spread over them."""

from typing import Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.references import OBJECT_NAME

DEEPSPEED = ("deepspeed-zero2", "deepspeed-zero3")
"""Strategies that DeepSpeed runs."""


class Parallelism(Block):
    """Nodes, processes and strategy."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"] = Field(
        default="auto",
        description="`auto`: DDP when the model fits on one device, else FSDP2. DeepSpeed shards gradients and optimizer state (`deepspeed-zero2`), or the weights too (`deepspeed-zero3`).",
    )
    nodes: int = Field(
        default=1, ge=1, le=1024, description="Nodes (pods on a cluster, local process groups on one machine)."
    )
    gpus_per_node: int = Field(
        default=1, ge=0, le=16, description="GPUs, and so processes, per node. 0: train on the CPU."
    )
    processes_per_node: int | None = Field(
        default=None, ge=1, le=64, description="Processes per node when `gpusPerNode` is 0. Default: 1."
    )
    gpu_class: str | None = Field(
        default=None,
        max_length=63,
        pattern=OBJECT_NAME,
        description="On a cluster: kind of GPU, one of the profile's. Default: its first.",
    )
    network: str | None = Field(
        default=None,
        max_length=63,
        pattern=OBJECT_NAME,
        description="On a cluster: network between the nodes, one of the profile's. Default: the pods' own.",
    )
    device_memory: str | None = Field(
        default=None,
        pattern=r"^[0-9]+(Mi|Gi)$",
        max_length=16,
        description='Memory of one device for the fit check, for example "80Gi". Default: the device that is found.',
    )
