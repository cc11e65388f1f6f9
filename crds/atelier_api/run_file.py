"""The RunFile: the resolved run, written by the planner, read by the runtime, which reads nothing else but credentials.

It is kept as `run.json` beside the checkpoints, so that a run can be repeated.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.training_run import TrainingRunSpec


class RunIdentity(Block):
    """Which run this is. The uid is the API server's on a cluster and `local` on one machine."""

    namespace: str
    name: str
    uid: str

    @property
    def prefix(self) -> str:
        """The run's folder below `storage.uri`: `<namespace>/<name>-<uid>`."""
        return f"{self.namespace}/{self.name}-{self.uid}"


class ExecutionPlan(Block):
    """What the planner decided; every choice that the spec left open is made here."""

    strategy: Literal["single", "ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"]
    device: Literal["cpu", "cuda"]
    nodes: int
    processes_per_node: int
    micro_batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    tiled_encoding: bool = Field(default=False, description="Whether latents are made of tiles.")
    tiled_samples: bool = Field(default=False, description="Whether samples are drawn in tiles.")
    learning_rate: float
    threads_per_process: int = Field(description="CPU threads of torch in one process; 0: torch's own choice.")
    predicted_peak_memory_bytes: int
    device_memory_bytes: int | None = Field(
        default=None, description="Memory the fit was checked against; none: unknown."
    )

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


class RunFile(Block):
    """The whole resolved run. All uris and paths are absolute."""

    schema_version: Literal[1] = 1
    identity: RunIdentity
    attempt: str = Field(default="1.0", description="`<n>.<k>`: attempt made by the operator, group restart inside it.")
    spec: TrainingRunSpec
    plan: ExecutionPlan
    model_folder: str = Field(description="Local folder of the base checkpoint, laid out as a hub repository.")
    scratch: str = Field(description="Local folder for staging, failure files and metrics of this run.")
    cache_uri: str = Field(description="Where latents and text embeddings are cached: a local folder.")

    @property
    def store_uri(self) -> str:
        """Root of everything the run writes."""
        return f"{self.spec.storage.uri.rstrip('/')}/{self.identity.prefix}"

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "RunFile":
        return cls.model_validate_json(path.read_text())
