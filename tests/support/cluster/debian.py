"""The container runtime, and buildah, from the machine's own Debian packages, unpacked below `.cache/cluster/` instead of installed.

Installed, containerd would start as a service of the machine and drive out the packages of other container engines. Only
iptables, which kube-proxy calls, is installed for good where it is missing.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from cluster.daemons import ClusterError
from cluster.programs import CLUSTER_CACHE
from go_build import locked

_RUNTIME = ("containerd", "runc", "containernetworking-plugins", "debootstrap")
# With the libraries that a minimal system may lack. Never its programs for users without root, nor a network: builds are chroots.
_BUILDAH = (
    *("buildah", "golang-github-containers-common", "golang-github-containers-image"),
    *("libgpgme11", "libassuan0", "libgpg-error0", "libdevmapper1.02.1", "libseccomp2"),
)


def distribution() -> tuple[str, str]:
    """The machine's distribution and release, such as ("debian", "bookworm"), from /etc/os-release."""
    lines = Path("/etc/os-release").read_text().splitlines()
    values = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
    return values.get("ID", ""), values.get("VERSION_CODENAME", "")


def why_not() -> str | None:
    """Why the packages cannot be had on this machine, or None."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "the container runtime comes from Debian's packages, and this machine has no apt-get"
    return None


def runtime_folder(report: Callable[[str], None]) -> Path:
    """The root of the unpacked packages: usr/bin/containerd, usr/sbin/runc, usr/lib/cni, usr/sbin/debootstrap."""
    folder = _unpacked("packages", _RUNTIME, report)
    with locked(CLUSTER_CACHE / ".packages.lock"):
        if shutil.which("iptables") is None:
            report("installing iptables")
            _apt(["install", "--yes", "--no-install-recommends", "iptables"], folder)
    return folder


def buildah_folder(report: Callable[[str], None]) -> Path:
    """The root of the unpacked packages: /usr with buildah and its libraries, /etc with what it reads there."""
    return _unpacked("buildah", _BUILDAH, report)


def _unpacked(name: str, packages: tuple[str, ...], report: Callable[[str], None]) -> Path:
    folder = CLUSTER_CACHE / f"{name}-{'-'.join(distribution())}"
    with locked(CLUSTER_CACHE / ".packages.lock"):
        if not folder.exists():
            report(f"unpacking {', '.join(packages)}")
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _apt(["update"], unfinished)
            _apt(["download", *packages], unfinished)
            for package in sorted(unfinished.glob("*.deb")):
                subprocess.run(
                    ["dpkg-deb", "--extract", str(package), str(unfinished)], check=True, capture_output=True
                )
                package.unlink()
            if (unfinished / "lib").is_dir():  # as on the machine, where it is a link
                shutil.copytree(unfinished / "lib", unfinished / "usr" / "lib", symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(unfinished / "lib")
            unfinished.rename(folder)
    return folder


def mirror() -> str:
    """Where this machine gets the packages of its release from, as apt is set up."""
    release = distribution()[1]
    format_ = "$(CODENAME) $(COMPONENT) $(REPO_URI)"
    listed = _apt(["indextargets", "--format", format_, "Identifier: Packages"], Path("/"))
    for line in listed.splitlines():
        codename, component, address = line.split(" ", 2)
        if (codename, component) == (release, "main"):
            return address
    raise ClusterError(f"apt knows no source for {release} main; see `apt-get indextargets`")


def _apt(arguments: list[str], folder: Path) -> str:
    # APT::Sandbox::User: apt otherwise tries to download as a user who may not write into the folder.
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", *arguments]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ClusterError(f"apt-get {' '.join(arguments)} failed:\n{result.stderr.strip()}")
    return result.stdout
