"""A running cluster: start it, talk to it, break parts of it, and take it away.

    with Cluster.start(kwok=4) as cluster:
        cluster.apply(manifest)
        cluster.kubectl("wait", "--for=condition=Complete", "job/x")

A cluster that `start` made belongs to the thread that started it: its processes end with that thread, however it ends.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster import addons, control_plane, debian, fake_nodes, network, programs, real_nodes, state
from cluster.api import Api, place
from cluster.certificates import Certificates
from cluster.daemons import ClusterError, Daemons, own_identity, wait_for
from cluster.network import Network
from go_build import silent

Manifest = Mapping[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SUPPORT = Path(__file__).resolve().parents[1]


def why_not(*, nodes: int = 0) -> str | None:
    """Why a cluster with so many real nodes cannot run on this machine, or None."""
    if sys.platform != "linux":
        return f"the cluster's programs run on Linux only, and this is {sys.platform}"
    needed = ["openssl", "setpriv", "unshare", *(["ip", "nsenter", "sysctl"] if nodes else [])]
    missing = [program for program in needed if shutil.which(program) is None]
    if missing:
        return f"the cluster needs the programs {', '.join(missing)}"
    return real_nodes.why_not() if nodes else None


class Cluster:
    """One cluster. `state` is the folder with its logs (`<process>.log`), certificates and data."""

    def __init__(self, record: state.Record, report: Callable[[str], None] = silent) -> None:
        """For a cluster that exists; use `start` to make one."""
        self.name = record.name
        self.state = record.state
        self._record = record
        self._report = report
        self.network = Network(record.hub) if record.nodes else Network()
        self.daemons = Daemons(record.state, self.network, tied=record.owner is not None)
        port = record.api_port
        node_url = f"https://{network.HUB_ADDRESS}:{port}"
        self.certificates = Certificates(record.state / "pki", f"https://127.0.0.1:{port}", node_url)
        self.api = Api(self.certificates)
        self._kubectl = [str(programs.program("kubectl")), f"--kubeconfig={self.kubeconfig}"]

    @classmethod
    def start(
        cls,
        *,
        nodes: int = 0,
        kwok: int = 0,
        jobset: bool = True,
        kueue: bool = True,
        gpus_per_node: int = fake_nodes.GPUS_PER_NODE,
        name: str | None = None,
        detached: bool = False,
        node_grace_seconds: int | None = None,
        images_in_memory: bool = True,
        crds: Sequence[Path] = (),
        report: Callable[[str], None] = silent,
    ) -> Self:
        """A new cluster that is ready for pods, with `nodes` real nodes (0 to 9) and `kwok` fake ones.

        `report` gets progress lines. A `detached` cluster stays until it is removed. A node that says nothing is given up after
        `node_grace_seconds` (Kubernetes: 50). Images of more than 3 GB need the disk (`images_in_memory=False`). Of kinds in files
        of `crds` the garbage collector knows from the beginning. Raises ClusterError.
        """
        if not 0 <= nodes <= 9:
            raise ClusterError(f"nodes is {nodes}; a cluster has 0 to 9 real nodes")
        if (reason := why_not(nodes=nodes)) is not None:
            raise ClusterError(reason)
        state.remove_orphans()
        engines = [name for name, wanted in (("jobset", jobset), ("kueue", kueue)) if wanted]
        beside = [*(["kwok"] if kwok else []), *(programs.REAL_NODES if nodes else [])]
        programs.build_all([*programs.CONTROL_PLANE, *engines, *beside], report)
        if nodes:
            real_nodes.prepare(report)
        owner = own_identity()
        chosen = name or f"test-{owner[0]}-{secrets.token_hex(2)}"
        ports = control_plane.ApiPorts(*network.free_ports(5))
        record = state.Record(chosen, None if detached else owner, nodes, ports.api)
        try:
            state.write(record)
        except FileExistsError:
            raise ClusterError(f"a cluster called {chosen!r} exists already, in {record.state}") from None
        with state.removed_on_error(record):
            cluster = cls(record, report)
            cluster._start_api(ports)
            for name in engines:
                cluster._start_addon(name)
            cluster._serve(crds)
            # After the kinds that its garbage collector has to follow: it looks for new ones every thirty seconds only.
            control_plane.start_controller_manager(cluster.daemons, cluster.certificates, ports, node_grace_seconds)
            control_plane.start_scheduler(cluster.daemons, cluster.certificates, ports)
            if nodes:
                cluster._start_nodes(nodes, gpus_per_node, images_in_memory)
            if kwok:
                cluster.add_fake_nodes(kwok, gpus_per_node)
            for name in engines:
                cluster._wait_for_addon(name)
            wait_for("no default service account", lambda: cluster._has_service_account("default"))
        return cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def down(self) -> None:
        """Take the cluster away with everything that it made on the machine."""
        state.remove(self._record)

    # What tests do with it

    @property
    def kubeconfig(self) -> Path:
        """The administrator's. Works on the machine and in the cluster's own network."""
        return self.certificates.kubeconfig("admin")

    @property
    def environment(self) -> dict[str, str]:
        """For a process that talks to this cluster, and for helm: nothing from the user's own files."""
        helm = {f"HELM_{kind}_HOME": str(self.state / "helm" / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        return {"KUBECONFIG": str(self.kubeconfig), "NO_PROXY": "127.0.0.1,localhost", **helm}

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """What kubectl prints. Raises ClusterError with its message when it fails."""
        return self._run([*self._kubectl, *arguments], input)

    def get(self, *arguments: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, manifests: str | Manifest | Sequence[Manifest]) -> None:
        """Server-side apply of YAML text, of one manifest or of several."""
        if isinstance(manifests, str):
            manifests = [each for each in yaml.load_all(manifests, LOADER) if each]
        for manifest in [manifests] if isinstance(manifests, Mapping) else manifests:
            self.api.apply(manifest)

    def make_namespace(self, name: str) -> str:
        """A new namespace in which pods can be made; gives its name."""
        self.api.send("POST", place("namespaces"), {"metadata": {"name": name}})
        wait_for(f"no default service account in {name}", lambda: self._has_service_account(name))
        return name

    def helm(self, *arguments: str) -> str:
        """What helm prints. Raises ClusterError with its message when it fails."""
        return self._run([str(programs.program("helm", self._report)), *arguments])

    def audit(self, since: int = 0) -> list[dict[str, Any]]:
        """Every request that the API server has finished, oldest first; with bodies of writes to what tests look at. `since`: only
        those after a moment that `audited` gave."""
        return control_plane.read_audit(self.state, since)

    def audited(self) -> int:
        """This moment: how much is in the audit log."""
        return control_plane.audit_log(self.state).stat().st_size

    def kubeconfig_of_service_account(self, namespace: str, account: str, url: str = "") -> Path:
        """A kubeconfig with a token of the account, valid for an hour, to act with no more than its rights. `url`: of a relay
        before the API server."""
        token = self.kubectl("create", "token", account, f"--namespace={namespace}", "--duration=1h").strip()
        path = self.state / f"{namespace}-{account}-{url.rpartition(':')[2]}.kubeconfig"
        self.certificates.write_kubeconfig(path, {"token": token}, url or self.certificates.api_url)
        return path

    # Processes: etcd apiserver controller-manager scheduler jobset kueue kwok coredns {containerd,kubelet,proxy}-node1 …

    def processes(self) -> dict[str, int | None]:
        """Ids by name; None for one that does not run."""
        return {name: self.daemons.pid(name) for name in self.daemons.names()}

    def pid(self, name: str) -> int:
        pid = self.daemons.pid(name)
        if pid is None:
            raise ClusterError(f"{name} does not run; the processes are {', '.join(self.daemons.names())}")
        return pid

    def stop(self, name: str, seconds: float = 10.0) -> None:
        """SIGTERM, after `seconds` SIGKILL; what the process has made in the API stays."""
        self.pid(name)
        self.daemons.stop(name, seconds)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process."""
        os.kill(self.pid(name), number)

    def restart(self, name: str) -> None:
        """Start a stopped process again and wait until it answers."""
        self.daemons.restart(name)
        if name == "apiserver":
            self._wait_for_api()
        elif name in ("jobset", "kueue"):
            self._wait_for_addon(name)

    def add_jobset(self) -> None:
        """Install JobSet into a cluster that was started without it."""
        self._start_addon("jobset")
        self._wait_for_addon("jobset")

    def add_kueue(self) -> None:
        """Install Kueue into a cluster that was started without it."""
        self._start_addon("kueue")
        self._wait_for_addon("kueue")

    def add_fake_nodes(self, count: int, gpus: int = fake_nodes.GPUS_PER_NODE) -> None:
        """Have `count` fake nodes, Ready; starts kwok when it does not run."""
        self._report(f"starting {count} fake nodes")
        if not self.daemons.is_running("kwok"):
            fake_nodes.start_kwok(self.daemons, self.certificates, network.free_ports(1)[0])
        self.apply(fake_nodes.fake_nodes(count, gpus))
        self.kubectl("wait", "--for=condition=Ready", "node", "-l", "type=kwok", "--timeout=60s")

    def import_image(self, archive: Path) -> None:
        """Give every real node an image; pods name it as the archive does, with `imagePullPolicy: Never`."""
        packages = debian.runtime_folder(self._report)
        for number in range(1, self._record.nodes + 1):
            real_nodes.import_image(self.state / f"node{number}", packages, archive)

    # Between the machine and the cluster's network (only with real nodes)

    @property
    def inside(self) -> list[str]:
        """To put before a command that must reach pods and nodes by their addresses; empty without real nodes."""
        return self.network.prefix

    def share(self, port: int) -> str:
        """Let pods, and the API server's webhook calls, reach a server of this machine's loopback.

        Gives the address for pods, such as "10.250.0.1:7070"; inside the API server's own network 127.0.0.1 works too.
        """
        if self.network.namespace is None:
            raise ClusterError("this cluster has no real nodes: everything in it reaches 127.0.0.1 as it is")
        if not self.daemons.is_running(f"share-{port}"):
            self._open_door(f"share-{port}", (self.network, f"0.0.0.0:{port}"), (Network(), f"127.0.0.1:{port}"))
        return f"{network.HUB_ADDRESS}:{port}"

    def disconnect(self, node: str) -> None:
        """Cut the network of a node ("node2"); its pods go on."""
        self._set_link(node, "down")

    def connect(self, node: str) -> None:
        """Mend what `disconnect` cut."""
        self._set_link(node, "up")

    def _start_api(self, ports: control_plane.ApiPorts) -> None:
        self._report("starting the control plane")
        if self._record.nodes:
            network.make_hub(self._record.hub)
        self.certificates.make_all(control_plane.service_names())
        control_plane.start_etcd(self.daemons, ports)
        control_plane.start_api_server(self.daemons, self.certificates, ports)
        if self._record.nodes:
            address = f"127.0.0.1:{ports.api}"
            self._open_door("api-door", (Network(), address), (self.network, address))
        self._wait_for_api()

    def _start_nodes(self, count: int, gpus: int, images_in_memory: bool) -> None:
        self._report(f"starting {count} real nodes")
        state.change_sysctls()
        starter = real_nodes.RealNodes(self.daemons, self.certificates, self.api, self._report, images_in_memory)
        starter.start_dns(network.free_ports(1)[0])
        starter.bind_roles()
        settings = [real_nodes.NodeSettings(number, self._record.node(number), gpus) for number in range(1, count + 1)]
        for node in settings:
            starter.start(node, network.make_node(self.network, self._record.node(node.number), node.number, count))
        for node in settings:
            starter.wait_until_ready(node)

    def _open_door(self, name: str, listen: tuple[Network, str], target: tuple[Network, str]) -> None:
        ends = [part for network_, address in (listen, target) for part in (network_.namespace or "-", address)]
        command = [sys.executable, "-m", "cluster.door", *ends]
        self.daemons.start(name, command, {"PYTHONPATH": str(_SUPPORT)}, Network())
        port = int(listen[1].rpartition(":")[2])
        self.daemons.wait_until(name, lambda: listen[0].accepts(port))

    def _serve(self, crds: Sequence[Path]) -> None:
        for path in crds:
            self.apply(path.read_text())
        if crds:
            wait_for("kinds not served", lambda: all(self.api.has_kind(path.stem) for path in crds))

    def _wait_for_api(self) -> None:
        self.daemons.wait_until("apiserver", self.api.is_ready)

    def _has_service_account(self, namespace: str) -> bool:
        """Without it pods are refused; the controller manager makes it some time after the namespace."""
        return self.api.get(place("serviceaccounts", namespace, "default")) is not None

    def _start_addon(self, name: str) -> None:
        self._report(f"starting {'JobSet' if name == 'jobset' else 'Kueue'}")
        ports = network.free_ports(3)
        self._addon_ports(name).write_text(json.dumps(ports))
        starter = self._addons()
        (starter.start_jobset if name == "jobset" else starter.start_kueue)(addons.AddonPorts(*ports))

    def _wait_for_addon(self, name: str) -> None:
        self._addons().wait_until_ready(name, addons.AddonPorts(*json.loads(self._addon_ports(name).read_text())))

    def _addons(self) -> addons.Addons:
        return addons.Addons(self.daemons, self.certificates, self._kubectl, self.api)

    def _addon_ports(self, name: str) -> Path:
        return self.state / f"{name}-ports.json"

    def _set_link(self, node: str, direction: str) -> None:
        if self.network.namespace is None:
            raise ClusterError(f"{node} is no real node: this cluster has none")
        self._run(["ip", "-n", self.network.namespace, "link", "set", node, direction])

    def _run(self, command: list[str], input: str | None = None) -> str:
        environment = {**os.environ, **self.environment, "GOGC": "off"}  # it ends soon
        result = subprocess.run(command, input=input, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            shown = " ".join(
                [Path(command[0]).name, *(part for part in command[1:] if not part.startswith("--kubeconfig="))]
            )
            raise ClusterError(f"{shown} failed: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout
