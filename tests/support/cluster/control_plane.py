"""etcd, the API server, the controller manager and the scheduler, one process each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.certificates import Certificates
from cluster.daemons import Daemons
from cluster.network import API_SERVICE_ADDRESS, HUB_ADDRESS, POD_RANGE, SERVICE_RANGE
from cluster.programs import program

# What tests want to read back in full. Everything else is logged without bodies, reads too: a test that waits asks ten times a
# second. A Secret's body never.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "omitManagedFields": True,
    "rules": [
        {"level": "Metadata", "resources": [{"group": "", "resources": ["secrets", "serviceaccounts/token"]}]},
        {
            "level": "RequestResponse",
            "verbs": ["create", "update", "patch", "delete", "deletecollection"],
            "resources": [
                {"group": "atelier.dev"},
                {"group": "jobset.x-k8s.io"},
                {"group": "batch"},
                {"group": "", "resources": ["pods", "pods/status", "pods/eviction"]},
                {"group": "coordination.k8s.io", "resources": ["leases"]},
            ],
        },
        {"level": "Metadata"},
    ],
}
# The default of 20 requests a second caps pod creation at about 17 a second.
_FAST_CLIENT = ["--kube-api-qps=300", "--kube-api-burst=600"]


@dataclass(frozen=True)
class ApiPorts:
    """Ports of the control plane, each free when chosen."""

    api: int
    etcd: int
    etcd_peer: int
    controller_manager: int
    scheduler: int


def start_etcd(daemons: Daemons, ports: ApiPorts) -> None:
    client, peer = f"http://127.0.0.1:{ports.etcd}", f"http://127.0.0.1:{ports.etcd_peer}"
    addresses = [f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}"]
    cluster = [f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"]
    # Nothing here must survive a crash of the machine, so the disk need not confirm every write.
    speed = ["--unsafe-no-fsync=true"]
    daemons.start("etcd", [str(program("etcd")), f"--data-dir={daemons.state / 'etcd'}", *addresses, *cluster, *speed])


def start_api_server(daemons: Daemons, certificates: Certificates, ports: ApiPorts) -> None:
    """Listens on loopback; with a network namespace of its own also on the bridge, where nodes and pods find it."""
    own_network = daemons.network.namespace is not None
    policy = daemons.state / "audit-policy.yaml"
    policy.write_text(yaml.safe_dump(_AUDIT_POLICY))
    flags = {
        "etcd-servers": f"http://127.0.0.1:{ports.etcd}",
        "bind-address": "0.0.0.0" if own_network else "127.0.0.1",
        "advertise-address": HUB_ADDRESS if own_network else "127.0.0.1",
        "secure-port": str(ports.api),
        "service-cluster-ip-range": SERVICE_RANGE,
        # No kube-proxy serves the API server: webhooks of Services are called at the addresses of their pods.
        "enable-aggregator-routing": "true",
        "cert-dir": str(daemons.state / "apiserver"),
        "client-ca-file": str(certificates.authority),
        "tls-cert-file": str(certificates.certificate("apiserver")),
        "tls-private-key-file": str(certificates.key("apiserver")),
        "kubelet-client-certificate": str(certificates.certificate("kubelet-client")),
        "kubelet-client-key": str(certificates.key("kubelet-client")),
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": str(certificates.folder / "sa.pub"),
        "service-account-signing-key-file": str(certificates.folder / "sa.key"),
        "authorization-mode": "Node,RBAC",
        "allow-privileged": "true",
        # Node names are in no DNS; without this logs and exec would look them up.
        "kubelet-preferred-address-types": "InternalIP",
        "enable-admission-plugins": "NodeRestriction",
        "audit-policy-file": str(policy),
        "audit-log-path": str(audit_log(daemons.state)),
        # One file for the cluster's life: unless told otherwise the server begins another one after 100 MB, and readers lose the rest.
        "audit-log-maxsize": "100000",
    }
    daemons.start(
        "apiserver", [str(program("kube-apiserver")), *(f"--{name}={value}" for name, value in flags.items())]
    )


def start_controller_manager(
    daemons: Daemons, certificates: Certificates, ports: ApiPorts, node_grace_seconds: int | None = None
) -> None:
    kubeconfig = str(certificates.kubeconfig("controller-manager"))
    flags = {
        "use-service-account-credentials": "true",
        "service-account-private-key-file": str(certificates.folder / "sa.key"),
        "root-ca-file": str(certificates.authority),
        "cluster-signing-cert-file": str(certificates.authority),
        "cluster-signing-key-file": str(certificates.key("ca")),
        "allocate-node-cidrs": "true",
        "cluster-cidr": POD_RANGE,
        "service-cluster-ip-range": SERVICE_RANGE,
        "flex-volume-plugin-dir": str(daemons.state / "volume-plugins"),  # made at start, by default below /usr
        **_component_flags(kubeconfig, ports.controller_manager),
    }
    if node_grace_seconds is not None:
        flags["node-monitor-grace-period"] = f"{node_grace_seconds}s"
    command = [str(program("kube-controller-manager")), *(f"--{name}={value}" for name, value in flags.items())]
    daemons.start("controller-manager", [*command, *_FAST_CLIENT])


def start_scheduler(daemons: Daemons, certificates: Certificates, ports: ApiPorts) -> None:
    flags = _component_flags(str(certificates.kubeconfig("scheduler")), ports.scheduler)
    command = [str(program("kube-scheduler")), *(f"--{name}={value}" for name, value in flags.items())]
    daemons.start("scheduler", [*command, *_FAST_CLIENT])


def audit_log(state: Path) -> Path:
    return state / "audit.log"


def read_audit(state: Path, since: int = 0) -> list[dict[str, Any]]:
    """Every finished request in the order of the log, from a byte on. A line that is still being written is left out, and so is one of
    which the beginning lies before `since`."""
    path = audit_log(state)
    if not path.exists():
        return []
    with path.open("rb") as log:
        log.seek(max(since - 1, 0))
        text = log.read().decode(errors="replace")
    lines = text.split("\n")[1 if since else 0 : -1]
    return [json.loads(line) for line in lines if line]


def _component_flags(kubeconfig: str, port: int) -> dict[str, str]:
    return {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "leader-elect": "false",
        "bind-address": "127.0.0.1",
        "secure-port": str(port),
    }


def service_names() -> list[str]:
    """Addresses under which the API server is called besides loopback: its certificate must name them."""
    return [API_SERVICE_ADDRESS, HUB_ADDRESS]
