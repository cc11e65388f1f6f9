"""The nodes' control groups: one folder per node in each hierarchy of cgroup v1, the only version that was tested."""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd")


def why_not() -> str | None:
    """Why real nodes cannot run on this machine's control groups, or None."""
    if (_ROOT / "cgroup.controllers").exists():
        return "real nodes were only tested with cgroup v1, and this machine has cgroup v2"
    missing = [name for name in _CONTROLLERS if not (_ROOT / name).is_dir()]
    if missing:
        return f"/sys/fs/cgroup lacks the cgroup v1 controllers {', '.join(missing)}"
    return None


def make(group: str) -> None:
    """The folder that the kubelet of a node puts its pods into."""
    for controller in _CONTROLLERS:
        (_ROOT / controller / group).mkdir(exist_ok=True)
    for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new group, which then can hold no process
        (_ROOT / "cpuset" / group / setting).write_text((_ROOT / "cpuset" / setting).read_text())


def pids(group: str) -> list[int]:
    """The processes in the group and below it."""
    found = {int(line) for folder in _folders(group) for line in _read_lines(folder / "cgroup.procs")}
    return sorted(found)


def remove(group: str) -> None:
    """Remove the group, which must hold no process any more."""
    for folder in _folders(group):
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass


def _folders(group: str) -> Iterator[Path]:
    """Deepest first. `unified` is where a hybrid machine shows cgroup v2 without controllers; runc makes folders there too."""
    for hierarchy in (*_CONTROLLERS, "unified"):
        top = _ROOT / hierarchy / group
        if top.is_dir():
            below = sorted((found for found in top.rglob("*") if found.is_dir()), key=lambda found: -len(found.parts))
            yield from below
            yield top


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # removed meanwhile, or a threaded group, which lists threads only
        return []
