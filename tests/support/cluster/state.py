"""What a cluster has made on the machine: one folder per cluster, and how to take everything of it away again.

The record is written before anything else is made, so that also a cluster whose process was killed can be removed, by whoever
comes next.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import cgroups
from cluster.daemons import Daemons, is_alive, kill_all, wait_for
from cluster.network import Network

# Short, because a socket's path may have 108 characters at most, and on a disk, because nodes keep their images there.
STATES = Path("/var/tmp") / f"atelier-clusters-{os.geteuid()}"
_SYSCTLS = STATES / "sysctls.json"
_WATCHES = "fs/inotify/max_user_instances"
_WATCHES_NEEDED = 1024  # three clusters of two nodes, each pod and kubelet with some, exceed Linux's 128
SYSCTL_NAMES = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", _WATCHES)


@dataclass(frozen=True)
class Record:
    """`owner` is the id and start time of the process that the cluster belongs to; None when it is to stay until it is removed."""

    name: str
    owner: tuple[int, int] | None
    nodes: int
    api_port: int

    @property
    def state(self) -> Path:
        return STATES / self.name

    @property
    def hub(self) -> str:
        return f"atelier-{self.name}-hub"

    def node(self, number: int) -> str:
        """The network namespace and the control group of a node."""
        return f"atelier-{self.name}-node{number}"

    def node_names(self) -> list[str]:
        return [self.node(number) for number in range(1, self.nodes + 1)]

    def is_orphan(self) -> bool:
        return self.owner is not None and not is_alive(*self.owner)


def write(record: Record) -> None:
    """Make the state folder. Raises FileExistsError when a cluster of that name has one."""
    record.state.mkdir(parents=True)
    (record.state / "record.json").write_text(json.dumps(asdict(record)))


def records() -> list[Record]:
    """Every cluster of this user on this machine, also those whose process has gone."""
    found = []
    for path in sorted(STATES.glob("*/record.json")):
        with suppress(FileNotFoundError, ValueError):  # removed, or not yet written, by another process
            document = json.loads(path.read_text())
            owner = document.pop("owner")
            found.append(Record(**document, owner=None if owner is None else (owner[0], owner[1])))
    return found


def find(name: str) -> Record | None:
    return next((record for record in records() if record.name == name), None)


def remove_orphans() -> list[str]:
    """Remove the clusters whose process was killed before it could; gives their names."""
    orphans = [record for record in records() if record.is_orphan()]
    for record in orphans:
        remove(record)
    return [record.name for record in orphans]


def remove(record: Record) -> None:
    """End every process of the cluster and take away its mounts, control groups, namespaces and files. Works in any state."""
    daemons = Daemons(record.state, Network(), tied=False)
    networks = [Network(record.hub), *(Network(name) for name in record.node_names())] if record.nodes else []

    def remaining() -> list[int]:
        """What is still alive: recorded processes, everything in the namespaces (shims too), and the pods."""
        recorded = [pid for name in daemons.names() if (pid := daemons.pid(name)) is not None]
        in_networks = [pid for network in networks for pid in network.pids()]
        return [*recorded, *in_networks, *(pid for name in record.node_names() for pid in cgroups.pids(name))]

    # Nothing of the cluster is worth an orderly end, its data go with it.
    kill_all(remaining)
    _unmount_below(record.state)
    for name in record.node_names():
        cgroups.remove(name)
    for network in networks:
        network.delete()
    with _locked():
        with suppress(FileNotFoundError):  # another process, which saw the same orphan, was faster
            shutil.rmtree(record.state)
        if record.nodes:
            _restore_sysctls()
        with suppress(OSError):  # other clusters are there
            STATES.rmdir()


def change_sysctls() -> None:
    """Allow the inotify instances that nodes need. The last cluster with nodes puts back what is changed here and by kubelets."""
    with _locked():
        if not _SYSCTLS.exists():
            _SYSCTLS.write_text(json.dumps({name: _sysctl(name).read_text().strip() for name in SYSCTL_NAMES}))
        if int(_sysctl(_WATCHES).read_text()) < _WATCHES_NEEDED:
            _sysctl(_WATCHES).write_text(str(_WATCHES_NEEDED))


def _restore_sysctls() -> None:
    if _SYSCTLS.exists() and not any(record.nodes for record in records()):
        for name, value in json.loads(_SYSCTLS.read_text()).items():
            _sysctl(name).write_text(value)
        _SYSCTLS.unlink()


@contextmanager
def _locked() -> Iterator[None]:
    """One process at a time changes what clusters share."""
    STATES.mkdir(parents=True, exist_ok=True)  # the last one may have gone meanwhile, with the folder
    folder = os.open(STATES, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name


def _unmount_below(folder: Path) -> None:
    def unmounted() -> bool:
        mounts = list(_mounts_below(folder))
        for mount in mounts:
            subprocess.run(["umount", str(mount)], capture_output=True, check=False)
        return not mounts

    wait_for(f"mounts below {folder} did not go", unmounted, 20)


def _mounts_below(folder: Path) -> Iterator[Path]:
    """Deepest first, so that each can be unmounted."""
    found = [line.split(" ")[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    yield from (Path(mount) for mount in sorted(found, reverse=True) if mount.startswith(f"{folder}/"))


@contextmanager
def removed_on_error(record: Record) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove(record)
        raise
