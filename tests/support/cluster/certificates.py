"""The cluster's certificates and kubeconfigs, made by the `openssl` program: one authority, one certificate per component.

A process makes each of them once, for all clusters that it starts: two dozen calls of openssl take as long as etcd and the
controllers together.
"""

import base64
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

_DAYS = "30"
_CLIENT = "clientAuth"
_SERVER = "serverAuth"
_SERVICE_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")


@dataclass(frozen=True)
class Certificates:
    """The folder with `<name>.crt`, `<name>.key` and, for clients of the API, `<name>.kubeconfig`.

    `api_url` is where the control plane and tests reach the API server, `node_api_url` where the processes of a node do.
    """

    folder: Path
    api_url: str
    node_api_url: str

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def kubeconfig(self, name: str) -> Path:
        return self.folder / f"{name}.kubeconfig"

    def make_all(self, addresses: list[str]) -> None:
        """The authority and what the control plane needs; servers are valid for loopback and `addresses`."""
        self.folder.mkdir(parents=True)
        self._write("ca", _authority())
        servers = [
            *(f"DNS:{name}" for name in (*_SERVICE_NAMES, "localhost")),
            *(f"IP:{ip}" for ip in ("127.0.0.1", *addresses)),
        ]
        self._sign("apiserver", "/CN=kube-apiserver", f"{_SERVER},{_CLIENT}", servers)
        self._sign("webhook", "/CN=webhook", _SERVER, servers)
        self._sign("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", _CLIENT)
        self.make_client("admin", "/O=system:masters/CN=admin")
        self.make_client("controller-manager", "/CN=system:kube-controller-manager")
        self.make_client("scheduler", "/CN=system:kube-scheduler")
        self._sign("proxy", "/CN=system:kube-proxy", _CLIENT)
        self.write_kubeconfig(self.kubeconfig("proxy"), self._embedded("proxy"), self.node_api_url)
        private, public = _account_keys()
        (self.folder / "sa.key").write_bytes(private)
        (self.folder / "sa.pub").write_bytes(public)

    def make_client(self, name: str, subject: str) -> None:
        """A client certificate and a kubeconfig with it. The subject's O are groups, its CN is the user."""
        self._sign(name, subject, _CLIENT)
        self.write_kubeconfig(self.kubeconfig(name), self._embedded(name), self.api_url)

    def make_node(self, name: str, address: str) -> None:
        """The certificate of a kubelet, as a client of the API and as the server of logs and exec."""
        names = [f"DNS:{name}", f"IP:{address}", "IP:127.0.0.1"]
        self._sign(name, f"/O=system:nodes/CN=system:node:{name}", f"{_SERVER},{_CLIENT}", names)
        self.write_kubeconfig(self.kubeconfig(name), self._embedded(name), self.node_api_url)

    def write_kubeconfig(self, path: Path, user: dict[str, str], url: str) -> None:
        """A kubeconfig for the API server at `url` with the given user entry (embedded certificates or a token)."""
        cluster = {"server": url, "certificate-authority-data": _base64(self.authority)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "atelier", "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "atelier", "context": {"cluster": "atelier", "user": "user"}}],
            "current-context": "atelier",
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(document))

    def _embedded(self, name: str) -> dict[str, str]:
        files = {"client-certificate-data": self.certificate(name), "client-key-data": self.key(name)}
        return {entry: _base64(path) for entry, path in files.items()}

    def _sign(self, name: str, subject: str, usages: str, names: list[str] | None = None) -> None:
        self._write(name, _signed(subject, usages, tuple(names or ())))

    def _write(self, name: str, pair: "Pair") -> None:
        for path, content in zip((self.key(name), self.certificate(name)), pair, strict=True):
            path.touch(mode=0o600)
            path.write_bytes(content)


Pair = tuple[bytes, bytes]
"""A key, and the certificate of it."""


@cache
def _authority() -> Pair:
    usage = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature")
    extensions = [part for each in usage for part in ("-addext", each)]
    with TemporaryDirectory() as name:
        key, certificate = Path(name, "key"), Path(name, "crt")
        _make_key(key)
        subject = ["-subj", "/CN=atelier-test-cluster", "-days", _DAYS, "-sha256"]
        _openssl("req", "-x509", "-new", "-key", str(key), *subject, "-out", str(certificate), *extensions)
        return key.read_bytes(), certificate.read_bytes()


@cache
def _signed(subject: str, usages: str, names: tuple[str, ...]) -> Pair:
    lines = ["basicConstraints=CA:FALSE", "keyUsage=digitalSignature,keyEncipherment", f"extendedKeyUsage={usages}"]
    lines += [f"subjectAltName={','.join(names)}"] if names else []
    with TemporaryDirectory() as folder:
        path = {name: Path(folder, name) for name in ("ca.key", "ca.crt", "key", "csr", "ext", "crt")}
        for name, content in zip(("ca.key", "ca.crt"), _authority(), strict=True):
            path[name].write_bytes(content)
        path["ext"].write_text("\n".join(lines) + "\n")
        _make_key(path["key"])
        _openssl("req", "-new", "-key", str(path["key"]), "-subj", subject, "-out", str(path["csr"]))
        signer = [
            "-CA",
            str(path["ca.crt"]),
            "-CAkey",
            str(path["ca.key"]),
            "-CAcreateserial",
            "-days",
            _DAYS,
            "-sha256",
        ]
        files = ["-in", str(path["csr"]), "-out", str(path["crt"]), "-extfile", str(path["ext"])]
        _openssl("x509", "-req", *files, *signer)
        return path["key"].read_bytes(), path["crt"].read_bytes()


@cache
def _account_keys() -> Pair:
    """Private and public, of the tokens of service accounts."""
    with TemporaryDirectory() as folder:
        private, public = Path(folder, "key"), Path(folder, "pub")
        _openssl("genrsa", "-out", str(private), "2048")
        _openssl("rsa", "-in", str(private), "-pubout", "-out", str(public))
        return private.read_bytes(), public.read_bytes()


def _make_key(path: Path) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _openssl(*arguments: str) -> None:
    result = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed: {result.stderr.strip()}")
