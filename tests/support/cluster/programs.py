"""The programs of the cluster: pinned Go modules under gomod/, built a module at a time, kept in `.cache/cluster/<module>-<hash>/`."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from go_build import CACHE, GoProgram, build_together, module_digest, module_folder, silent

KUBERNETES_VERSION = "1.36.3"
KWOK_MODULE, JOBSET_MODULE, KUEUE_MODULE = "sigs.k8s.io/kwok", "sigs.k8s.io/jobset", "sigs.k8s.io/kueue"

CLUSTER_CACHE = CACHE / "cluster"
_GOMOD = Path(__file__).resolve().parent / "gomod"
_MAJOR, _MINOR, _ = KUBERNETES_VERSION.split(".")

# Without these the programs call themselves v0.0.0 and helm believes in Kubernetes 1.20.
_STAMPS = {
    **{
        f"k8s.io/{library}/version.gitVersion": f"v{KUBERNETES_VERSION}"
        for library in ("component-base", "client-go/pkg")
    },
    **{f"k8s.io/{library}/version.gitMajor": _MAJOR for library in ("component-base", "client-go/pkg")},
    **{f"k8s.io/{library}/version.gitMinor": _MINOR for library in ("component-base", "client-go/pkg")},
    **{f"helm.sh/helm/v3/pkg/{package}.k8sVersionMajor": _MAJOR for package in ("chartutil", "lint/rules")},
    **{f"helm.sh/helm/v3/pkg/{package}.k8sVersionMinor": _MINOR for package in ("chartutil", "lint/rules")},
}
_STAMPED = " ".join(["-s -w", *(f"-X {variable}={value}" for variable, value in _STAMPS.items())])

CONTROL_PLANE = ("kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "kubectl")
REAL_NODES = ("kubelet", "kube-proxy", "coredns")

# Everything in one module shares compiled packages.
_PACKAGES = {
    "kube-apiserver": ("unified", "k8s.io/kubernetes/cmd/kube-apiserver"),
    "kube-controller-manager": ("unified", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    "kube-scheduler": ("unified", "k8s.io/kubernetes/cmd/kube-scheduler"),
    "kubectl": ("unified", "k8s.io/kubernetes/cmd/kubectl"),
    "etcd": ("unified", "go.etcd.io/etcd/server/v3"),
    "kwok": ("unified", "sigs.k8s.io/kwok/cmd/kwok"),
    "kubelet": ("unified", "k8s.io/kubernetes/cmd/kubelet"),
    "kube-proxy": ("unified", "k8s.io/kubernetes/cmd/kube-proxy"),
    "coredns": ("unified", "github.com/coredns/coredns"),
    "helm": ("unified", "helm.sh/helm/v3/cmd/helm"),
    "jobset": ("jobset", JOBSET_MODULE),
    "kueue": ("kueue", f"{KUEUE_MODULE}/cmd/kueue"),
}
ALL = tuple(_PACKAGES)
_MANIFESTS = {
    KWOK_MODULE: ("unified", "kustomize/stage"),
    JOBSET_MODULE: ("jobset", "config"),
    KUEUE_MODULE: ("kueue", "config"),
}
# The programs that a folder named by KUBEBUILDER_ASSETS may bring (the convention of controller-runtime's envtest).
_ASSETS = ("etcd", "kube-apiserver", "kubectl")


def program(name: str, report: Callable[[str], None] = silent) -> Path:
    """The binary called `name`, from KUBEBUILDER_ASSETS when it is there, else built when it is not cached."""
    if (asset := _asset(name)) is not None:
        return asset
    build_together({_binary(name): _go_program(name)}, report)
    return _binary(name)


def build_all(names: Iterable[str], report: Callable[[str], None] = silent) -> None:
    """Build what is missing of `names`, a module at a time, with the manifests they publish."""
    wanted = set(names)
    for module in dict.fromkeys(module for module, _ in _PACKAGES.values()):
        own = [name for name in wanted if _PACKAGES[name][0] == module and _asset(name) is None]
        build_together({_binary(name): _go_program(name) for name in sorted(own)}, report)
    for module in _MANIFESTS:
        if module.rpartition("/")[2] in wanted:
            published(module)


def published(module: str) -> Path:
    """The folder of manifests that a pinned Go module publishes, copied beside its binary, so that a cache of those is enough."""
    name, folder = _MANIFESTS[module]
    copy = _module_cache(name) / f"{module.rpartition('/')[2]}-manifests"
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}.{os.getpid()}")
        # Module sources are read-only files: only their contents are copied, so that the cache can be deleted.
        shutil.copytree(module_folder(_GOMOD / name, module) / folder, unfinished, copy_function=shutil.copyfile)
        for path in [unfinished, *(found for found in unfinished.rglob("*") if found.is_dir())]:
            path.chmod(0o755)
        try:
            unfinished.rename(copy)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return copy


def _go_program(name: str) -> GoProgram:
    module, package = _PACKAGES[name]
    return GoProgram(name, _GOMOD / module, package, _STAMPED if module == "unified" else "-s -w")


def _binary(name: str) -> Path:
    return _module_cache(_PACKAGES[name][0]) / name


def _module_cache(module: str) -> Path:
    return CLUSTER_CACHE / f"{module}-{module_digest(_GOMOD / module, _STAMPED if module == 'unified' else '')}"


def _asset(name: str) -> Path | None:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder or name not in _ASSETS:
        return None
    path = Path(folder) / name
    return path if path.exists() else None
