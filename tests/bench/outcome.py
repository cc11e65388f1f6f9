"""Where a benchmark ran, and the table of what it found."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pairs import Row
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "atelier-training")


def machine() -> dict[str, Any]:
    """The machine, its versions, and how busy it was."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    """Model and, where the system tells it, nothing else."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(heading: str, groups: Iterable[list[Row]], *, width: int = 150) -> None:
    """A line about the machine, then the rows, a rule between the groups. A terminal that is wider is used."""
    console = Console(width=max(width, Console().width))
    console.print(heading)
    table = Table("", "what", "measured", "target", "how far")
    for rows in groups:
        for row in rows:
            style = "" if not row.standing else "green" if row.standing == "met" else "yellow"
            table.add_row(row.id, row.what, row.measured, row.target, row.standing, style=style)
        table.add_section()
    console.print(table)
