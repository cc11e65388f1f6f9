"""Where the cluster's processes listen: on the loopback of the machine, or inside network namespaces of their own.

With real nodes everything runs in namespaces: one, the hub, holds the control plane and a bridge; each node is another one on
that bridge. So nothing of the machine's own network is changed, clusters side by side use the same addresses without a
conflict, and deleting the namespaces deletes every link, route and packet filter rule.
"""

import ctypes
import os
import secrets
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HUB_ADDRESS = "10.250.0.1"
POD_RANGE = "10.244.0.0/16"
SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_PORTS = range(20000, 32768)


def node_address(number: int) -> str:
    return f"10.250.0.{10 + number}"


def node_pods(number: int) -> str:
    return f"10.244.{number}.0/24"


@dataclass(frozen=True)
class Network:
    """The machine's own network (`namespace` is None) or a named network namespace."""

    namespace: str | None = None

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it there. Not `ip netns exec`: that would hide mounts and cgroups from it."""
        return [] if self.namespace is None else ["nsenter", f"--net={_NAMESPACES / self.namespace}"]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes inside the block belong to this network."""
        if self.namespace is None:
            yield
            return
        with open("/proc/thread-self/ns/net") as before, (_NAMESPACES / self.namespace).open() as inside:
            _set_network(inside.fileno())
            try:
                yield
            finally:
                _set_network(before.fileno())

    def answers(self, url: str) -> bool:
        """Whether a GET of the plain HTTP `url` answers 200."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with self.entered():
            try:
                with opener.open(url, timeout=2) as response:
                    return bool(response.status == 200)
            except (urllib.error.URLError, OSError):
                return False

    def serves(self, url: str) -> bool:
        """Whether the server of the https `url`, whoever it is, knows the path: a GET may be refused, but not with 404."""
        unverified = ssl.SSLContext(
            ssl.PROTOCOL_TLS_CLIENT
        )  # without the authorities of the machine, which take long to load
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
        )
        with self.entered():
            try:
                with opener.open(url, timeout=2):
                    return True
            except urllib.error.HTTPError as error:
                return bool(error.code != 404)
            except (urllib.error.URLError, OSError):
                return False

    def accepts(self, port: int) -> bool:
        """Whether something listens on `port` of this network's loopback."""
        with self.entered():
            probe = socket.socket()
        with probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def pids(self) -> list[int]:
        """The processes in this namespace."""
        if self.namespace is None or not (_NAMESPACES / self.namespace).exists():
            return []
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def delete(self) -> None:
        if self.namespace is not None and (_NAMESPACES / self.namespace).exists():
            _ip("netns", "del", self.namespace)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on, outside the range from which outgoing connections take theirs."""
    found: set[int] = set()
    while len(found) < count:
        # Not the seeded generator: test processes side by side would draw the same ports.
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return sorted(found)


def make_hub(namespace: str) -> Network:
    """A namespace with the bridge that nodes are plugged into; the hub itself is 10.250.0.1 on it."""
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", namespace, "link", "add", "nodes", "type", "bridge")
    _ip("-n", namespace, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "nodes")
    _ip("-n", namespace, "link", "set", "nodes", "up")
    return Network(namespace)


def make_node(hub: Network, namespace: str, number: int, count: int) -> Network:
    """A namespace plugged into the hub's bridge as `node<number>` of `count`, with routes to the pods of the others."""
    assert hub.namespace is not None
    link = f"node{number}"
    _ip("netns", "add", namespace)
    _ip("-n", hub.namespace, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", hub.namespace, "link", "set", link, "master", "nodes", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", namespace, "addr", "add", f"{node_address(number)}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    _ip("-n", namespace, "route", "add", "default", "via", HUB_ADDRESS)
    _ip("-n", hub.namespace, "route", "add", node_pods(number), "via", node_address(number))
    for other in range(1, count + 1):
        if other != number:
            _ip("-n", namespace, "route", "add", node_pods(other), "via", node_address(other))
    network = Network(namespace)
    settings = ("net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1")
    # `ip netns exec` here on purpose: it shows the namespace's own /proc/sys and /sys.
    subprocess.run(["ip", "netns", "exec", namespace, "sysctl", "-qw", *settings], check=True, capture_output=True)
    return network


def _ip(*arguments: str) -> str:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)} failed: {result.stderr.strip()}")
    return result.stdout


def _set_network(namespace: int) -> None:
    """`os.setns` exists from Python 3.12 on only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")
