"""A node's own view of the file system: what containerd and kubelet write at fixed paths goes into the node's folder.

A kubelet empties /var/lib/kubelet/device-plugins when it starts, containerd puts sockets into /run, and so on, whatever their
configuration says: two nodes would disturb each other, and a container engine or a kubelet of the machine itself. All mounts of
volumes and containers are made in this view as well, so that they go with its last process.
"""

import subprocess
from pathlib import Path

from cluster.daemons import ClusterError
from cluster.unpacked import lines_to_use

# By the folder above them, which the machine has; it is seen read-only, with these in it even where the machine lacks them.
_OWN = {"/var/lib": ("cni", "kubelet"), "/var/log": ("containers",)}


def make_namespace(folder: Path, images: Path, images_in_memory: bool) -> None:
    """A mount namespace for the node whose folder this is, with unpacked images; it stays until it is unmounted."""
    # A namespace can only be kept on a mount that is not shared with others.
    kept = folder / "mount-namespace"
    kept.mkdir()
    _run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(kept)])
    _run(["mount", "--make-private", str(kept)])
    _file(folder).touch()
    root = images_folder(folder)
    root.mkdir()
    lines = ["set -e", "mount -t tmpfs tmpfs /run"]
    if images_in_memory:
        # With the containers' own layers: unpacking and deleting thousands of files takes longer than all the rest.
        lines.append(f"mount -t tmpfs -o size=8g tmpfs '{root}'")
    lines += lines_to_use(images, root)
    for above, names in _OWN.items():
        seen = folder / "seen" / above[1:]
        for name in names:
            (seen / name).mkdir(parents=True)
            (folder / "own" / name).mkdir(parents=True)
        lines.append(f"mount -t overlay overlay -o 'lowerdir={seen}:{above}' {above}")
        lines += [f"mount --bind '{folder}/own/{name}' {above}/{name}" for name in names]
    _run(["unshare", f"--mount={_file(folder)}", "--propagation", "private", "sh", "-c", "\n".join(lines)])


def images_folder(folder: Path) -> Path:
    """Where containerd keeps images and the layers that containers write; in memory it is empty outside the node's view."""
    return folder / "containerd"


def prefix(folder: Path) -> list[str]:
    """What to put before a command that is to see the node's view."""
    return ["nsenter", f"--mount={_file(folder)}"]


def _file(folder: Path) -> Path:
    return folder / "mount-namespace" / "file"


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ClusterError(f"{' '.join(command[:2])} failed: {result.stderr.strip()}")
