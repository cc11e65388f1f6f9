"""Certificates of servers on loopback, each its own authority, by the `openssl` program."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from atelier_operator.admission.certificate import CERTIFICATE, KEY


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path) -> None:
        """As the files of a mounted Secret."""
        folder.mkdir(exist_ok=True)
        (folder / CERTIFICATE).write_bytes(self.certificate)
        (folder / KEY).write_bytes(self.key)

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.certificate.decode())


def make_pair(folder: Path, days: int = 30) -> Pair:
    """A new pair for 127.0.0.1 and localhost."""
    certificate, key = folder / "new.crt", folder / "new.key"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=webhook", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-days", str(days)),
        *("-keyout", str(key), "-out", str(certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return Pair(certificate.read_bytes(), key.read_bytes())


def served_certificate(port: int) -> bytes:
    """What a server on loopback shows a new client (DER)."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port), timeout=10))
