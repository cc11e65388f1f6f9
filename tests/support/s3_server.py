"""A real S3 server for tests: versitygw, built once from its Go module, on a loopback port, in plain or with TLS."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3

from go_build import CACHE, GoProgram, build

VERSION = "v1.8.0"
MODULE = Path(__file__).resolve().parent / "gomod" / "versitygw"
PROGRAM = GoProgram("versitygw", MODULE, "github.com/versity/versitygw/cmd/versitygw")
ACCESS_KEY, SECRET_KEY = "tester", "tester-secret"
BUCKET = "atelier"


@dataclass(frozen=True)
class Certificate:
    """A private authority and a certificate of it for the loopback address."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket. `folder` holds the bucket's objects as plain files, to be damaged by tests."""

    url: str
    folder: Path
    certificate: Certificate | None

    @property
    def ca_bundle(self) -> str | None:
        return None if self.certificate is None else str(self.certificate.authority)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client process needs in its environment: credentials, and nothing from the user's own files."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """Put the files of a folder below a prefix of a bucket, which is made."""
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            verify=self.ca_bundle,
        )
        client.create_bucket(Bucket=bucket)
        for path in (found for found in folder.rglob("*") if found.is_file()):
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")


def build_server() -> Path:
    """The server's binary below `.cache/`, built when it is not there."""
    return build(PROGRAM, CACHE / "bin" / f"{PROGRAM.name}-{VERSION}")


def make_certificate(folder: Path) -> Certificate:
    """A new private authority and a certificate of it for 127.0.0.1, made by the `openssl` program."""
    folder.mkdir(parents=True, exist_ok=True)
    result = Certificate(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subject = ["-x509", "-subj", "/CN=Atelier test authority", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    _openssl("req", *subject, *new_key, "-keyout", str(folder / "ca.key"), "-out", str(result.authority))
    signed = ["-x509", "-CA", str(result.authority), "-CAkey", str(folder / "ca.key"), "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    _openssl("req", *signed, *names, *new_key, "-keyout", str(result.key), "-out", str(result.certificate))
    return result


@contextmanager
def running_server(folder: Path, certificate: Certificate | None = None) -> Iterator[S3Server]:
    """A server over `folder`, ended afterwards."""
    data = folder / "data"
    (data / BUCKET).mkdir(parents=True)
    port = _free_port()
    tls = [] if certificate is None else ["--cert", str(certificate.certificate), "--key", str(certificate.key)]
    attributes = [] if _has_extended_attributes(data) else ["--sidecar", str(folder / "sidecar")]
    command = [str(build_server()), "--port", f"127.0.0.1:{port}", *tls, "-q", "posix", *attributes, str(data)]
    (folder / "sidecar").mkdir()
    environment = os.environ | {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_up(process, port, folder / "server.log")
        scheme = "http" if certificate is None else "https"
        yield S3Server(f"{scheme}://127.0.0.1:{port}", data / BUCKET, certificate)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_extended_attributes(folder: Path) -> bool:
    try:
        os.setxattr(folder, "user.atelier", b"1")
    except (AttributeError, OSError):
        return False
    return True


def _wait_until_up(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')}")
