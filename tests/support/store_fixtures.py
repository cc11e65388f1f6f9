"""Fixtures of stores: a folder, and real S3 servers in plain and with TLS. A test module takes them with `pytest_plugins`."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from atelier_api.v1alpha1.storage import S3Settings
from atelier_runtime.store import Store, open_store
from atelier_runtime.store.s3 import S3Store
from s3_fault_proxy import FaultProxy, fault_proxy
from s3_server import BUCKET, S3Server, make_certificate, running_server
from s3_settings import FAST, s3_settings


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server in plain HTTP."""
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with a certificate of a private authority."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("s3-tls")
    with running_server(folder, make_certificate(folder / "certificates")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The plain server, with its credentials in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_proxy(s3_environment: S3Server) -> Iterator[FaultProxy]:
    """A relay before the plain server that can be told to break requests."""
    with fault_proxy(s3_environment.url) as proxy:
        yield proxy


@pytest.fixture
def proxied_store(s3_environment: S3Server, s3_proxy: FaultProxy, request: pytest.FixtureRequest) -> S3Store:
    """A store of its own for this test, behind the fault proxy, with short pauses between tries."""
    settings = s3_settings(s3_environment, s3_proxy.url)
    return S3Store(f"s3://{BUCKET}/{_own_prefix(request)}", settings, retry=FAST)


@pytest.fixture(
    params=[
        "folder",
        pytest.param("http", marks=pytest.mark.processes),
        pytest.param("tls", marks=pytest.mark.processes),
    ]
)
def any_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of each kind."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"), S3Settings())
    server: S3Server = request.getfixturevalue("s3_server" if request.param == "http" else "s3_tls_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return S3Store(f"s3://{BUCKET}/{_own_prefix(request)}", s3_settings(server), retry=FAST)


def _own_prefix(request: pytest.FixtureRequest) -> str:
    """A prefix that no other test uses."""
    node: str = request.node.nodeid
    return "tests/" + "".join(c if c.isalnum() else "-" for c in node)[-120:]
