"""The project's own images, built from `images/` by buildah upon the base image of `images.py`; no registry and no container engine.

An archive is named by a hash of everything that goes into it, so it is built once and again only when that changes. Buildah's layers
are kept below `.cache/cluster/buildah/`: after a change of our own code the dependencies are not installed again.
"""

import ast
import configparser
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster import debian
from cluster.daemons import ClusterError
from cluster.images import BASE_IMAGE, base_archive
from cluster.programs import CLUSTER_CACHE
from go_build import ROOT, locked

OPERATOR, RUNTIME = "operator", "runtime"
_LAYERS = CLUSTER_CACHE / "buildah"
_COUNTS = _LAYERS / "counts"
_ARCHIVES = CLUSTER_CACHE / "images"
# Other checkouts share the folder and may be importing theirs. The runtime's archive has 5 GB.
_KEPT = {OPERATOR: 3, RUNTIME: 1}
# Of pip's settings those that say where packages come from, and nothing of this machine's folders.
_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries")
_IGNORED = "Dockerfile.dockerignore"
_AUTHORITY = "/run/secrets/ca.crt"
_STORAGE = f"""\
[storage]
driver = "overlay"
graphroot = "{_LAYERS}"
runroot = "{_COUNTS}"
"""


# In a mount namespace of its own: the packages are seen as if they were installed, and with it go the mounts of a build that is killed
# and the folder that counts them.
_ALONE = """\
set -e
packages=$1
counts=$2
shift 2
mount -t overlay overlay -o "lowerdir=$packages/usr:/usr" /usr
mount -t overlay overlay -o "lowerdir=$packages/etc:/etc" /etc
mount -t tmpfs tmpfs "$counts"
exec buildah "$@"
"""


@dataclass(frozen=True)
class BuiltImage:
    """An image in an archive of `docker save`'s layout, and its name in there."""

    name: str
    archive: Path

    @property
    def repository(self) -> str:
        return self.name.rpartition(":")[0]

    @property
    def tag(self) -> str:
        return self.name.rpartition(":")[2]


def why_not() -> str | None:
    """Why images cannot be built on this machine, or None."""
    if os.geteuid() != 0:
        return "building images needs root (debootstrap for their base, and chroot)"
    return debian.why_not()


def built(image: str, report: Callable[[str], None]) -> BuiltImage:
    """`images/<image>`, built when it is not there; another process that needs it meanwhile waits for it. Raises ClusterError."""
    if (reason := why_not()) is not None:
        raise ClusterError(reason)
    base = base_archive(debian.runtime_folder(report), report)
    tag = digest(image, base)
    made = BuiltImage(f"localhost/atelier-{image}:{tag}", _ARCHIVES / f"atelier-{image}-{tag}.tar")
    with locked(CLUSTER_CACHE / ".buildah.lock"):
        if made.archive.exists():
            made.archive.touch()  # in use: the oldest go first
        else:
            report(f"building the image of the {image}")
            started = time.monotonic()
            _build(image, made, base, debian.buildah_folder(report))
            report(f"built the image of the {image} in {time.monotonic() - started:.0f} s")
    return made


def sources(image: str, root: Path = ROOT) -> list[Path]:
    """Every file that the build of an image can see, and those that tell it what to do."""
    folder = root / "images" / image
    kept = [line[1:] for line in (folder / _IGNORED).read_text().splitlines() if line.startswith("!")]
    found = [folder / "Dockerfile", folder / _IGNORED]
    for path in (root / each for each in kept):
        found += [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [path for path in found if "__pycache__" not in path.parts]


def digest(image: str, base: Path, root: Path = ROOT) -> str:
    """Changes with the sources and with the base, for the name of the archive."""
    result = hashlib.sha256(base.name.encode())
    for path in sources(image, root):
        result.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return result.hexdigest()[:12]


def _build(image: str, made: BuiltImage, base: Path, packages: Path) -> None:
    buildah = _Buildah(packages, _ARCHIVES / f"atelier-{image}.log")
    buildah.log.unlink(missing_ok=True)
    _remove_old(image, _KEPT[image] - 1, buildah)
    # Named by its recipe in there: `localhost/base:1` may be another one's.
    name = f"{BASE_IMAGE.rpartition(':')[0]}:{base.stem}"
    if not buildah.has(name):
        buildah.run("pull", "--quiet", f"docker-archive:{base}")
        buildah.run("tag", BASE_IMAGE, name)
    folder = ROOT / "images" / image
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with _pip_secrets() as secrets:
        buildah.run(
            *("build", "--isolation=chroot", "--layers", "--pull-never", *secrets),
            *(f"--build-arg=BASE={name}", f"--build-arg=VERSION={version}"),
            *(f"--file={folder / 'Dockerfile'}", f"--ignorefile={folder / _IGNORED}"),
            *(f"--tag={made.name}", str(ROOT)),
        )
    unfinished = made.archive.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)  # an archive that exists is not written anew
    buildah.run("push", "--quiet", made.name, f"docker-archive:{unfinished}:{made.name}")
    unfinished.rename(made.archive)


def _remove_old(image: str, kept: int, buildah: "_Buildah") -> None:
    archives = sorted(_ARCHIVES.glob(f"atelier-{image}-*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    for archive in archives[kept:]:
        name = f"localhost/atelier-{image}:{archive.stem.rpartition('-')[2]}"
        if buildah.has(name):
            buildah.run("rmi", name)
        archive.unlink()


@dataclass(frozen=True)
class _Buildah:
    """Buildah with layers of its own, that reads no settings of the machine. Everything that it says goes to the log."""

    packages: Path
    log: Path

    def has(self, name: str) -> bool:
        command = [*self._command(), "inspect", "--type=image", name]
        return subprocess.run(command, env=self._environment(), capture_output=True, check=False).returncode == 0

    def run(self, *arguments: str) -> None:
        command = [*self._command(), *arguments]
        with self.log.open("ab") as log:
            result = subprocess.run(command, env=self._environment(), stdout=log, stderr=log, check=False)
        if result.returncode != 0:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise ClusterError(f"buildah {arguments[0]} failed; all it said is in {self.log}, which ends with:\n{last}")

    def _command(self) -> list[str]:
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _ALONE,
            "sh",
            str(self.packages),
            str(_COUNTS),
        ]

    def _environment(self) -> dict[str, str]:
        _COUNTS.mkdir(parents=True, exist_ok=True)
        (_LAYERS / "storage.conf").write_text(_STORAGE)
        (_LAYERS / "containers.conf").touch()
        return {
            **os.environ,
            "CONTAINERS_CONF": str(_LAYERS / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(_LAYERS / "storage.conf"),
            "TMPDIR": str(_LAYERS),
        }


@contextlib.contextmanager
def _pip_secrets() -> Iterator[list[str]]:
    """Flags that show the build, and not the image, where this machine's pip gets its packages."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():  # global.index-url='…', and :env:.index-url='…', which comes first and wins
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], str(ast.literal_eval(value)))
    given = {name: settings[name] for name in _PIP_SETTINGS if name in settings}
    authority = settings.get("cert")
    if authority is not None:
        given["cert"] = _AUTHORITY
    document = configparser.RawConfigParser()
    document["global"] = given
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        document.write(file)
        file.flush()
        flags = [f"--secret=id=pip.conf,src={file.name}"]
        yield flags if authority is None else [*flags, f"--secret=id=ca.crt,src={authority}"]
