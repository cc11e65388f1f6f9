"""Real nodes: containerd, kubelet and kube-proxy in a network namespace each, CoreDNS in the hub; GPUs are numbers only."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import cgroups, debian, mounts, network
from cluster.api import Api
from cluster.certificates import Certificates
from cluster.daemons import ClusterError, Daemons
from cluster.images import PAUSE_IMAGE, base_archive, pause_archive
from cluster.network import Network
from cluster.programs import program
from cluster.unpacked import unpacked


@dataclass(frozen=True)
class NodeSettings:
    """One node: `number` counts from 1, `group` is its control group, `gpus` what it claims to have."""

    number: int
    group: str
    gpus: int

    @property
    def name(self) -> str:
        return f"node{self.number}"


def why_not() -> str | None:
    """Why real nodes cannot run on this machine, or None."""
    if os.geteuid() != 0:
        return "real nodes need root (network namespaces, mounts, control groups)"
    return debian.why_not() or cgroups.why_not()


def prepare(report: Callable[[str], None]) -> None:
    """Everything that is made once per machine and not in a Go module: packages and images."""
    _images(debian.runtime_folder(report), report)


def _images(packages: Path, report: Callable[[str], None]) -> Path:
    """What every node has, unpacked."""
    return unpacked([pause_archive(report), base_archive(packages, report)], packages, report)


@dataclass(frozen=True)
class RealNodes:
    """Starts nodes below `daemons.state`."""

    daemons: Daemons
    certificates: Certificates
    api: Api
    report: Callable[[str], None]
    images_in_memory: bool = True

    def start_dns(self, port: int) -> None:
        """CoreDNS on the hub's address; `port` is for its readiness. Answers names of the cluster and no others."""
        corefile = self.daemons.state / "Corefile"
        corefile.write_text(
            f".:53 {{\n  bind {network.HUB_ADDRESS}\n  errors\n  kubernetes cluster.local in-addr.arpa {{\n"
            f"    kubeconfig {self.certificates.kubeconfig('admin')}\n    pods insecure\n    ttl 0\n  }}\n"
            f"  ready 127.0.0.1:{port}\n}}\n"
        )
        self.daemons.start("coredns", [str(program("coredns")), "-conf", str(corefile)])
        self.daemons.wait_until("coredns", lambda: self.daemons.network.answers(f"http://127.0.0.1:{port}/ready"))

    def bind_roles(self) -> None:
        """kube-proxy's user is bound by an add-on of kubeadm in other clusters; here it is by this."""
        group, path = "rbac.authorization.k8s.io", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
        role = {"apiGroup": group, "kind": "ClusterRole", "name": "system:node-proxier"}
        user = {"apiGroup": group, "kind": "User", "name": "system:kube-proxy"}
        self.api.send("POST", path, {"metadata": {"name": "proxy"}, "roleRef": role, "subjects": [user]})

    def start(self, node: NodeSettings, namespace: Network) -> None:
        """Start the node's processes; returns when the runtime has its images and the kubelet is started, not yet Ready."""
        folder = self.daemons.state / node.name
        folder.mkdir()
        packages = debian.runtime_folder(self.report)
        mounts.make_namespace(folder, _images(packages, self.report), self.images_in_memory)
        self._start_containerd(node, folder, packages, namespace)
        cgroups.make(node.group)
        self.certificates.make_node(node.name, network.node_address(node.number))
        self._start_kubelet(node, folder, namespace)
        self._start_proxy(node, folder, namespace)

    def wait_until_ready(self, node: NodeSettings) -> None:
        """Wait for the node to be Ready, then give it its GPUs."""
        path = f"/api/v1/nodes/{node.name}"

        def ready() -> bool:
            conditions = ((self.api.get(path) or {}).get("status") or {}).get("conditions") or ()
            return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)

        self.daemons.wait_until(f"kubelet-{node.name}", ready, seconds=120)
        # Both, because the kubelet copies a new capacity to allocatable only some seconds later.
        gpus = {"nvidia.com/gpu": str(node.gpus)}
        self.api.send("PATCH", f"{path}/status", {"status": {"capacity": gpus, "allocatable": gpus}})

    def _start_containerd(self, node: NodeSettings, folder: Path, packages: Path, namespace: Network) -> None:
        cni = folder / "cni"
        cni.mkdir()
        (cni / "10-pods.conflist").write_text(json.dumps(_pod_network(node.number, folder)))
        config = folder / "containerd.toml"
        config.write_text(_containerd_config(folder, packages))
        environment = {"PATH": os.pathsep.join([*_program_folders(packages), os.environ["PATH"]])}
        command = [str(packages / "usr" / "bin" / "containerd"), "--config", str(config)]
        self.daemons.start(f"containerd-{node.name}", [*mounts.prefix(folder), *command], environment, namespace)
        self.daemons.wait_until(f"containerd-{node.name}", lambda: _accepts(folder / "containerd.sock"))

    def _start_kubelet(self, node: NodeSettings, folder: Path, namespace: Network) -> None:
        (folder / "resolv.conf").touch()
        config = folder / "kubelet.yaml"
        config.write_text(yaml.safe_dump(_kubelet_config(node, folder, self.certificates)))
        flags = {
            "config": str(config),
            "kubeconfig": str(self.certificates.kubeconfig(node.name)),
            "hostname-override": node.name,
            "node-ip": network.node_address(node.number),
            "root-dir": str(folder / "kubelet"),
            "cert-dir": str(folder / "kubelet" / "pki"),
        }
        command = [str(program("kubelet")), *(f"--{name}={value}" for name, value in flags.items())]
        self.daemons.start(f"kubelet-{node.name}", [*mounts.prefix(folder), *command], network=namespace)

    def _start_proxy(self, node: NodeSettings, folder: Path, namespace: Network) -> None:
        config = folder / "proxy.yaml"
        document = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self.certificates.kubeconfig("proxy"))},
            "hostnameOverride": node.name,
            "mode": "iptables",
            "oomScoreAdj": 0,
            "clusterCIDR": network.POD_RANGE,
            # Zero leaves the machine's own limits alone.
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        }
        config.write_text(yaml.safe_dump(document))
        command = [str(program("kube-proxy")), f"--config={config}"]
        self.daemons.start(f"proxy-{node.name}", [*mounts.prefix(folder), *command], network=namespace)


def import_image(folder: Path, packages: Path, archive: Path) -> None:
    """Give the node of the folder an image, under the name that the archive has for it."""
    command = [*_ctr(folder, packages), "images", "import", str(archive)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ClusterError(f"{folder.name}: the image {archive} could not be imported: {result.stderr.strip()}")


def _pod_network(number: int, folder: Path) -> dict[str, Any]:
    ipam = {
        "type": "host-local",
        "dataDir": str(folder / "ipam"),
        "ranges": [[{"subnet": network.node_pods(number)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": ipam}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}


def _containerd_config(folder: Path, packages: Path) -> str:
    """Version 2 of the format, for Debian's containerd 1.6."""
    cri = "plugins.'io.containerd.grpc.v1.cri'"
    return f"""\
version = 2
root = '{mounts.images_folder(folder)}'
state = '{folder}/containerd-state'
disabled_plugins = ['io.containerd.tracing.processor.v1.otlp', 'io.containerd.internal.v1.tracing', 'io.containerd.internal.v1.opt']
[grpc]
  address = '{folder}/containerd.sock'
[ttrpc]
  address = '{folder}/containerd.sock.ttrpc'
[{cri}]
  sandbox_image = '{PAUSE_IMAGE}'
  disable_apparmor = true
  # Where root may not lower the score of a process, runc would fail to start any container.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [{cri}.containerd]
    snapshotter = 'overlayfs'
  [{cri}.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [{cri}.containerd.runtimes.runc.options]
      BinaryName = '{packages}/usr/sbin/runc'
      Root = '{folder}/runc'
      SystemdCgroup = false
  [{cri}.cni]
    bin_dir = '{packages}/usr/lib/cni'
    conf_dir = '{folder}/cni'
"""


def _kubelet_config(node: NodeSettings, folder: Path, certificates: Certificates) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": network.node_address(node.number),
        "port": 10250,
        "healthzBindAddress": "127.0.0.1",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(certificates.authority)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(certificates.certificate(node.name)),
        "tlsPrivateKeyFile": str(certificates.key(node.name)),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.group}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": ["pods"],
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "clusterDNS": [network.HUB_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(folder / "resolv.conf"),
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi"},
        "podLogsDir": str(folder / "pod-logs"),
        "volumePluginDir": str(folder / "volume-plugins"),
        "oomScoreAdj": 0,
        "maxPods": 60,
        "nodeStatusUpdateFrequency": "5s",
        "nodeStatusReportFrequency": "1m",
    }


def _accepts(path: Path) -> bool:
    """Whether something listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _ctr(folder: Path, packages: Path) -> list[str]:
    return [str(packages / "usr" / "bin" / "ctr"), "--address", f"{folder}/containerd.sock", "--namespace", "k8s.io"]


def _program_folders(packages: Path) -> list[str]:
    """Where containerd finds its shim."""
    return [str(packages / "usr" / "bin"), str(packages / "usr" / "sbin")]
