"""A run on this machine: from a parsed TrainingRun to the RunFile. The only planner module beside `checkpoint_facts` that reads the disk.

The environment, the home folder and the hardware are arguments; nothing here looks at the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atelier_api.run_file import RunFile
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner.memory import ModelFacts
from atelier_operator.planner.strategy import Machine


@dataclass(frozen=True)
class Host:
    """This machine's hardware, as the command line found it. `gpu_memory_bytes` has one entry per GPU; None: unknown."""

    cores: int
    memory_bytes: int | None
    gpu_memory_bytes: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """What lies outside the run: where relative paths start, the user's home, the environment, and folders for caches."""

    run_folder: Path
    home: Path
    environment: Mapping[str, str]

    @property
    def hub_cache(self) -> Path:
        """Where the hub library keeps snapshots."""
        raise NotImplementedError

    @property
    def cache_base(self) -> Path:
        """Where runs whose store is remote keep caches and scratch: `~/.cache/atelier`."""
        raise NotImplementedError


def local_machine(run: TrainingRun, host: Host) -> Machine:
    """The device that the run would use on this host. Raises ConfigError when there are not enough GPUs."""
    raise NotImplementedError


def local_facts(run: TrainingRun, around: Surroundings) -> ModelFacts:
    """The model's sizes: from the checkpoint's own files where it is on this machine, else from the table of families."""
    raise NotImplementedError


def resolve_local(run: TrainingRun, machine: Machine, around: Surroundings) -> RunFile:
    """The RunFile of a run on this machine. Raises ConfigError or CredentialsError with one line per mistake."""
    raise NotImplementedError
