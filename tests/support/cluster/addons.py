"""JobSet and Kueue as plain processes beside the API server: their published manifests, with webhooks called by URL."""

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.api import Api
from cluster.certificates import Certificates
from cluster.daemons import Daemons, wait_for
from cluster.programs import JOBSET_MODULE, KUEUE_MODULE, program, published

# What runs the controllers inside a cluster, and what they may do there: here they are processes of the administrator. Flow control
# and monitoring are not needed.
_LEFT_OUT = {
    "Deployment",
    "Service",
    "Secret",
    "ConfigMap",
    "APIService",
    "FlowSchema",
    "PriorityLevelConfiguration",
    "ServiceMonitor",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "ClusterRole",
    "ClusterRoleBinding",
}
# Kueue publishes webhooks for a dozen kinds whose controllers are switched off here; left in, they would refuse those kinds.
_KUEUE_WEBHOOKS = re.compile(r"^[mv](job|jobset|clusterqueue|cohort|resourceflavor|workload)\.kb\.io$")
_JOBSET_CRDS = ("jobsets.jobset.x-k8s.io",)
_KUEUE_CRDS = tuple(
    f"{kind}.kueue.x-k8s.io" for kind in ("workloads", "clusterqueues", "localqueues", "resourceflavors")
)


@dataclass(frozen=True)
class AddonPorts:
    webhook: int
    metrics: int
    health: int


@dataclass(frozen=True)
class Addons:
    """Installs the two controllers into a running control plane."""

    daemons: Daemons
    certificates: Certificates
    kubectl: list[str]
    api: Api

    def start_jobset(self, ports: AddonPorts) -> None:
        """Apply JobSet's manifests and start its controller; `wait_until_ready` waits for it."""
        folder = self._certificate_folder("jobset")
        config = {
            "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
            "kind": "Configuration",
            "leaderElection": {"leaderElect": False},
            # Its own certificates would be for the name of a Service only.
            "internalCertManagement": {"enable": False},
            "webhook": {"host": "127.0.0.1", "port": ports.webhook, "certDir": str(folder)},
            "metrics": {"bindAddress": f"127.0.0.1:{ports.metrics}", "certDir": str(folder)},
            "health": {"healthProbeBindAddress": f"127.0.0.1:{ports.health}"},
        }
        self._apply("jobset", JOBSET_MODULE, ports.webhook, re.compile(""))
        # Started before the CRD is served, its first list fails and it waits for seconds before the next.
        self._wait_for_crds(_JOBSET_CRDS)
        self._start("jobset", [str(program("jobset")), "--zap-devel=false"], config, ports)

    def start_kueue(self, ports: AddonPorts) -> None:
        """Apply Kueue's manifests and start its controller; `wait_until_ready` waits for it."""
        folder = self._certificate_folder("kueue")
        config = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta1",
            "kind": "Configuration",
            "namespace": "kueue-system",
            "health": {"healthProbeBindAddress": f"127.0.0.1:{ports.health}"},
            "metrics": {"bindAddress": f"127.0.0.1:{ports.metrics}", "enableClusterQueueResources": True},
            "webhook": {"host": "127.0.0.1", "port": ports.webhook, "certDir": str(folder)},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "manageJobsWithoutQueueName": False,
            "clientConnection": {"qps": 50, "burst": 100},
            "integrations": {"frameworks": ["batch/job", "jobset.x-k8s.io/jobset"]},
        }
        self._apply("kueue", KUEUE_MODULE, ports.webhook, _KUEUE_WEBHOOKS)
        self._wait_for_crds(_KUEUE_CRDS)
        command = [*self._kueue_prefix(folder), str(program("kueue")), "--feature-gates=VisibilityOnDemand=false"]
        self._start("kueue", command, config, ports)

    def _start(self, name: str, command: list[str], config: dict[str, Any], ports: AddonPorts) -> None:
        path = self.daemons.state / f"{name}-config.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = {"KUBECONFIG": str(self.certificates.kubeconfig("admin"))}
        self.daemons.start(name, [*command, f"--config={path}"], environment)

    def wait_until_ready(self, name: str, ports: AddonPorts) -> None:
        """Wait until the controller calls itself ready and serves its webhooks: their server listens before it knows them."""
        network = self.daemons.network
        self.daemons.wait_until(name, lambda: network.answers(f"http://127.0.0.1:{ports.health}/readyz"))
        urls = json.loads(self._webhooks(name).read_text())
        self.daemons.wait_until(name, lambda: all(network.serves(url) for url in urls))

    def _webhooks(self, name: str) -> Path:
        return self.daemons.state / f"{name}-webhooks.json"

    def _certificate_folder(self, name: str) -> Path:
        folder = self.daemons.state / f"{name}-certificates"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(self.certificates.certificate("webhook"), folder / "tls.crt")
        shutil.copyfile(self.certificates.key("webhook"), folder / "tls.key")
        return folder

    def _kueue_prefix(self, certificates: Path) -> list[str]:
        """Kueue 0.12.2 reads its metrics certificate from /etc/kueue, a path fixed in its code: it gets an /etc of its own,
        a read-only overlay that only this process sees."""
        shown = self.daemons.state / "kueue-etc"
        inside = shown / "kueue" / "metrics" / "certs"
        inside.mkdir(parents=True, exist_ok=True)
        for name in ("tls.crt", "tls.key"):
            shutil.copyfile(certificates / name, inside / name)
        mount = f'mount -t overlay overlay -o "lowerdir={shown}:/etc" /etc && exec "$@"'
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        return ["unshare", *as_root, "--mount", "--propagation", "private", "sh", "-c", mount, "sh", *self.daemons.tie]

    def _apply(self, name: str, module: str, port: int, webhooks: re.Pattern[str]) -> None:
        bundle = base64.b64encode(self.certificates.authority.read_bytes()).decode()
        objects = _outside_the_cluster(self._rendered(module), f"https://127.0.0.1:{port}", bundle, webhooks)
        hooks = [hook for each in objects for hook in each.get("webhooks", ())]
        self._webhooks(name).write_text(json.dumps(sorted({hook["clientConfig"]["url"] for hook in hooks})))
        manifest = self.daemons.state / f"{name}.json"
        manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        # Server-side: the CRDs are too big for the annotation of a client-side apply.
        apply = [*self.kubectl, "apply", "--server-side", "--force-conflicts", "-f", str(manifest)]
        subprocess.run(apply, check=True, capture_output=True)

    def _rendered(self, module: str) -> list[dict[str, Any]]:
        """The manifests as kustomize puts them together; kept beside them, since that takes a second each time."""
        folder = published(module)
        kept = folder / "rendered.json"
        if not kept.exists():
            kustomize = [*self.kubectl, "kustomize", str(folder / "default")]
            text = subprocess.run(kustomize, check=True, capture_output=True).stdout
            documents = list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
            unfinished = kept.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(documents))
            unfinished.rename(kept)
        return list(json.loads(kept.read_text()))

    def _wait_for_crds(self, names: tuple[str, ...]) -> None:
        wait_for(f"{', '.join(names)} not established", lambda: all(self.api.has_kind(name) for name in names))


def _outside_the_cluster(
    rendered: list[dict[str, Any]], url: str, bundle: str, webhooks: re.Pattern[str]
) -> list[dict[str, Any]]:
    """The published objects without the controller's own, each webhook's Service replaced by `url`."""
    kept = []
    for document in rendered:
        if document["kind"] in _LEFT_OUT:
            continue
        if document["kind"].endswith("WebhookConfiguration"):
            document["webhooks"] = [hook for hook in document["webhooks"] if webhooks.search(hook["name"])]
            for hook in document["webhooks"]:
                path = hook["clientConfig"]["service"]["path"]
                hook["clientConfig"] = {"url": url + path, "caBundle": bundle}
        if document["kind"] == "CustomResourceDefinition":
            document["spec"].pop("conversion", None)
        kept.append(document)
    return kept
