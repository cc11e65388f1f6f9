"""This machine, found without torch: cores, memory, GPUs, and what lies around a run's file."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from atelier_operator.planner.local import Host, Surroundings

MIB = 1 << 20
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
PROBE_SECONDS = 20


def surroundings(path: Path) -> Surroundings:
    """Where the relative paths of a run's file start, the user's home and the environment."""
    return Surroundings(folder=path.absolute().parent, home=Path.home(), environment=dict(os.environ))


def host() -> Host:
    """The hardware that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Host(cores=cores, memory_bytes=memory_bytes(), gpu_memory_bytes=gpu_memory(os.environ))


def memory_bytes(limit: Path = CGROUP_LIMIT) -> int | None:
    """RAM of this machine, or what the container may take of it."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return total


def gpu_memory(environment: Mapping[str, str]) -> tuple[int | None, ...]:
    """Memory of each GPU in bytes, as the driver's tool tells it; empty without a driver. CUDA_VISIBLE_DEVICES hides GPUs."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found: dict[str, int | None] = {}
    for line in answer.splitlines():
        index, uuid, memory = (part.strip() for part in line.split(","))
        found[index] = found[uuid] = int(memory) * MIB if memory.isdigit() else None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = (
        [name for name in found if name.isdigit()] if visible is None else [name.strip() for name in visible.split(",")]
    )
    return tuple(found[name] for name in names if name in found)
