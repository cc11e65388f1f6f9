"""Two container images as archives below `.cache/cluster/`, made without a container engine.

`pause` holds a pod's namespaces. `base` is a minimal system of the machine's own release with Python: a virtual environment of the
machine, mounted by hostPath at its own path, runs in it, and the project's images are built upon it (`buildah.py`).
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from cluster.daemons import ClusterError
from cluster.debian import distribution, mirror
from cluster.programs import CLUSTER_CACHE
from go_build import GoProgram, build, locked

PAUSE_IMAGE = "localhost/pause:1"
BASE_IMAGE = "localhost/base:1"
_PAUSE = GoProgram("pause", Path(__file__).resolve().parent / "gomod" / "pause", "atelier.dev/tests/pause")
_INCLUDED = "python3,python3-venv,ca-certificates,procps"
_USELESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache/apt", "var/log")

# Of one layer. Buildah builds upon no image without.
_HISTORY = [{"created": "1970-01-01T00:00:00Z"}]


def pause_archive(report: Callable[[str], None]) -> Path:
    digest = hashlib.sha256((_PAUSE.module / "main.go").read_bytes()).hexdigest()[:12]
    archive = CLUSTER_CACHE / "images" / f"pause-{digest}.tar"
    with locked(CLUSTER_CACHE / ".images.lock"):
        if not archive.exists():
            binary = build(_PAUSE, CLUSTER_CACHE / "images" / f"pause-{digest}", report)
            layer = io.BytesIO()
            with tarfile.open(fileobj=layer, mode="w") as tar:
                tar.add(binary, "pause")
            _write_archive(archive, PAUSE_IMAGE, layer.getvalue(), ["/pause"])
    return archive


def base_archive(packages: Path, report: Callable[[str], None]) -> Path:
    """`packages` is the folder of unpacked Debian packages, for its debootstrap."""
    recipe = hashlib.sha256(repr((_INCLUDED, _USELESS, _HISTORY)).encode()).hexdigest()[:12]
    archive = CLUSTER_CACHE / "images" / f"base-{'-'.join(distribution())}-{recipe}.tar"
    with locked(CLUSTER_CACHE / ".images.lock"):
        if not archive.exists():
            report("making the base image (about two minutes)")
            root = CLUSTER_CACHE / "images" / "base.unfinished"
            shutil.rmtree(root, ignore_errors=True)
            _debootstrap(root, packages)
            tar = ["tar", "--create", "--numeric-owner", "--one-file-system", "--directory", str(root), "."]
            layer = subprocess.run(tar, check=True, capture_output=True).stdout
            _write_archive(archive, BASE_IMAGE, layer, ["python3"])
            shutil.rmtree(root)
    return archive


def _debootstrap(root: Path, packages: Path) -> None:
    release = distribution()[1]
    root.parent.mkdir(parents=True, exist_ok=True)
    # In a mount namespace, since it mounts /proc in the new system and leaves that behind when it is killed.
    command = [
        *("unshare", "--mount", "--propagation", "private"),
        str(packages / "usr" / "sbin" / "debootstrap"),
        "--variant=minbase",
        f"--include={_INCLUDED}",
        release,
        str(root),
    ]
    environment = {**os.environ, "DEBOOTSTRAP_DIR": str(packages / "usr" / "share" / "debootstrap")}
    result = subprocess.run([*command, mirror()], env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = "\n".join(result.stdout.splitlines()[-10:])
        raise ClusterError(f"debootstrap {release} failed:\n{last}\n{result.stderr.strip()}")
    for folder in _USELESS:
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()
    for package in (root / "var" / "cache").rglob("*.deb"):
        package.unlink()


def _write_archive(archive: Path, image: str, layer: bytes, command: list[str]) -> None:
    """An archive in the layout of `docker save`: a manifest, a config and one layer."""
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
            "history": _HISTORY,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [image], "Layers": [f"{digest}/layer.tar"]}]
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        for name, content in (
            (config_name, config),
            (f"{digest}/layer.tar", layer),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    unfinished.rename(archive)
