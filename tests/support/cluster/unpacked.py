"""Images that are unpacked once per machine: nodes begin with them, and share their layers, which nobody writes to.

Unpacking ten thousand files takes longer than all else that a node does until it is Ready.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.daemons import ClusterError, wait_for
from cluster.programs import CLUSTER_CACHE
from go_build import locked

SNAPSHOTS = Path("io.containerd.snapshotter.v1.overlayfs", "snapshots")


def unpacked(archives: Sequence[Path], packages: Path, report: Callable[[str], None]) -> Path:
    """A folder with `root`, which is what containerd keeps of the images but for the files of their layers, and `layers`, which
    has those by the number of the layer. `packages` is the folder of unpacked Debian packages."""
    names = hashlib.sha256(repr([archive.name for archive in archives]).encode()).hexdigest()[:12]
    folder = CLUSTER_CACHE / "images" / f"unpacked-{packages.name}-{names}"
    with locked(CLUSTER_CACHE / ".images.lock"):
        if not folder.exists():
            report("unpacking the images of nodes")
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _unpack(unfinished / "root", archives, packages)
            (unfinished / "layers").mkdir()
            for layer in (unfinished / "root" / SNAPSHOTS).iterdir():
                (layer / "fs").rename(unfinished / "layers" / layer.name)
                (layer / "fs").mkdir()
            unfinished.rename(folder)
    return folder


def lines_to_use(folder: Path, root: Path) -> list[str]:
    """Shell commands for a node's view of the file system: they fill containerd's empty `root` from the folder of `unpacked`."""
    lines = [f"cp --archive '{folder}/root/.' '{root}'"]
    for layer in sorted((folder / "layers").iterdir()):
        seen = root / SNAPSHOTS / layer.name / "fs"
        lines += [f"mount --bind '{layer}' '{seen}'", f"mount -o remount,bind,ro '{seen}'"]
    return lines


def _unpack(root: Path, archives: Sequence[Path], packages: Path) -> None:
    """By a containerd that serves nothing else. Its socket is elsewhere: a socket's path may have 108 characters at most."""
    root.mkdir(parents=True)
    programs = packages / "usr" / "bin"
    with tempfile.TemporaryDirectory() as name:
        config, socket = Path(name, "config.toml"), Path(name, "sock")
        config.write_text(
            f"version = 2\nroot = '{root}'\nstate = '{name}/state'\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n"
            f"[grpc]\n  address = '{socket}'\n[ttrpc]\n  address = '{name}/ttrpc'\n"
        )
        ctr = [str(programs / "ctr"), "--address", str(socket), "--namespace", "k8s.io"]
        with Path(name, "log").open("wb") as log:
            command = [str(programs / "containerd"), "--config", str(config)]
            daemon = subprocess.Popen(command, stdout=log, stderr=log, cwd=name, env={"PATH": os.environ["PATH"]})
        try:
            answers = lambda: subprocess.run([*ctr, "version"], capture_output=True).returncode == 0  # noqa: E731
            wait_for("containerd, which is to unpack images, does not answer", answers)
            for archive in archives:
                result = subprocess.run([*ctr, "images", "import", str(archive)], capture_output=True, text=True)
                if result.returncode != 0:
                    raise ClusterError(f"the image {archive} could not be unpacked: {result.stderr.strip()}")
        finally:
            daemon.terminate()
            daemon.wait()
