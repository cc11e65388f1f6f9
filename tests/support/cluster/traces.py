"""What a cluster could leave behind on the machine."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cluster.state import STATES, SYSCTL_NAMES, records

# Packets of a filter chain, seconds that an address is still valid.
_COUNTED = re.compile(r"\[\d+:\d+\]|valid_lft \S+|preferred_lft \S+")
_FIXED_PATHS = (
    "/etc/cni",
    "/etc/kueue",
    "/opt/containerd",
    "/run/containerd",
    "/usr/libexec/kubernetes",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
)


def traces_of(name: str) -> list[str]:
    """Everything on the machine that belongs to the cluster called `name`: none of it may be there after its end."""
    return sorted([*_processes(name), *_mounts(name), *_named_paths(name)])


def machine() -> frozenset[str]:
    """What a cluster must leave as it is, whatever other clusters do meanwhile: a value to compare before and after."""
    folders = {path for path in _FIXED_PATHS if Path(path).exists()}
    return frozenset({*_network(), *folders, *_sysctls()})


def _processes(name: str) -> Iterator[str]:
    """Command lines that name the cluster's folder or one of its network namespaces."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if f"{STATES / name}/" in line or f"atelier-{name}-" in line:
            yield f"process {path.parent.name}: {line}"


def _mounts(name: str) -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if f"{STATES / name}/" in line or f"atelier-{name}-" in line:
            yield f"mount {line}"


def _named_paths(name: str) -> Iterator[str]:
    """Its folder, its network namespaces and its control groups."""
    if (STATES / name).exists():
        yield str(STATES / name)
    for folder in ("/run/netns", "/sys/fs/cgroup"):
        yield from (str(path) for path in Path(folder).glob(f"**/atelier-{name}-*"))


def _network() -> set[str]:
    """Links, addresses, routes and packet filter rules of the machine itself."""
    commands = [["ip", "-o", "addr"], ["ip", "-o", "link"], ["ip", "route"], ["iptables-save"]]
    lines: set[str] = set()
    for command in commands:
        if shutil.which(command[0]) is not None:
            output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            lines |= {_COUNTED.sub("", line) for line in output.splitlines() if not line.startswith("#")}
    return lines


def _sysctls() -> set[str]:
    """None while a cluster has real nodes, since its kubelets have changed them for as long as it runs."""
    if any(record.nodes for record in records()):
        return set()
    return {f"{name}={(Path('/proc/sys') / name).read_text().strip()}" for name in SYSCTL_NAMES}
