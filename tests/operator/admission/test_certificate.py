"""The certificate is replaced while the server runs: seen by TLS clients, not by mocks."""

import asyncio
import logging
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from atelier_operator.admission import certificate as module
from atelier_operator.admission.certificate import CERTIFICATE, KEY, ServerCertificate, expires
from atelier_operator.admission.measure import WebhookMetrics
from atelier_operator.admission.server import Webhook, webhook_served
from reviews import profiles
from tls import Pair, make_pair, served_certificate

pytestmark = pytest.mark.processes  # openssl, a dozen times

EXPIRY = "atelier_operator_webhook_certificate_expiry_timestamp_seconds"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    return make_pair(folder), make_pair(folder, days=365 * 30)  # the second one ends after 2050


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "secret"


class Serving:
    """A webhook's server, and the certificate that it shows."""

    def __init__(self, certificate: ServerCertificate, port: int, registry: CollectorRegistry) -> None:
        self.certificate = certificate
        self.port = port
        self.registry = registry

    async def shown(self) -> bytes:
        return await asyncio.to_thread(served_certificate, self.port)

    async def until_shown(self, pair: Pair) -> None:
        for _ in range(400):
            if await self.shown() == pair.der:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the new certificate is not served")


def serve(folder: Path, story: Callable[[Serving], Awaitable[None]]) -> None:
    async def run() -> None:
        registry = CollectorRegistry()
        metrics = WebhookMetrics(registry)
        certificate = ServerCertificate(folder, metrics.certificate)
        async with webhook_served(Webhook(profiles(), lambda: True, metrics), certificate, 0) as port:
            await story(Serving(certificate, port, registry))

    asyncio.run(run())


def test_a_new_certificate_is_served_without_a_restart(
    pairs: tuple[Pair, Pair], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    first, second = pairs
    first.write(folder)

    async def story(serving: Serving) -> None:
        assert await serving.shown() == first.der
        ends = serving.registry.get_sample_value(EXPIRY)
        second.write(folder)
        await serving.until_shown(second)
        assert serving.registry.get_sample_value(EXPIRY) > ends

    serve(folder, story)


def test_an_open_connection_outlives_the_certificate(pairs: tuple[Pair, Pair], folder: Path) -> None:
    first, second = pairs
    first.write(folder)

    async def story(serving: Serving) -> None:
        client = ssl.create_default_context(cadata=first.certificate.decode())
        reader, writer = await asyncio.open_connection("127.0.0.1", serving.port, ssl=client)
        second.write(folder)
        assert serving.certificate.look()
        writer.write(b"GET /validate HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 405")
        writer.close()
        assert await serving.shown() == second.der

    serve(folder, story)


def test_a_pair_that_is_half_written_changes_nothing(
    pairs: tuple[Pair, Pair], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = pairs
    first.write(folder)

    async def story(serving: Serving) -> None:
        for broken in (
            Pair(second.certificate, first.key),
            Pair(second.certificate[:200], second.key),
            Pair(second.certificate, b""),
            Pair(second.certificate, second.key[:40]),
        ):
            broken.write(folder)
            assert not serving.certificate.look()
            assert await serving.shown() == first.der
        (folder / KEY).unlink()
        assert not serving.certificate.look()
        assert await serving.shown() == first.der
        second.write(folder)
        assert serving.certificate.look()
        assert await serving.shown() == second.der

    with caplog.at_level(logging.WARNING):
        serve(folder, story)
    assert "the one before is served" in caplog.text


def test_an_encrypted_key_is_refused_and_asks_for_no_password(pairs: tuple[Pair, Pair], folder: Path) -> None:
    encrypt = ["openssl", "pkey", "-aes256", "-passout", "pass:secret"]
    key = subprocess.run(encrypt, input=pairs[0].key, capture_output=True, check=True).stdout
    Pair(pairs[0].certificate, key).write(folder)
    assert not ServerCertificate(folder, lambda _: None).look()


def test_a_problem_is_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate = ServerCertificate(folder, lambda _: None)
    assert [certificate.look() for _ in range(3)] == [False] * 3
    assert caplog.text.count("runs are let in unchecked") == 1


def test_without_a_certificate_the_server_waits_for_one(pairs: tuple[Pair, Pair], folder: Path) -> None:
    async def story(serving: Serving) -> None:
        with pytest.raises(ssl.SSLError):
            await serving.shown()
        assert serving.registry.get_sample_value(EXPIRY) is None
        pairs[0].write(folder)
        assert serving.certificate.look()
        assert await serving.shown() == pairs[0].der

    serve(folder, story)


def test_unchanged_files_are_not_taken_again(pairs: tuple[Pair, Pair], folder: Path) -> None:
    pairs[0].write(folder)
    taken: list[float] = []
    certificate = ServerCertificate(folder, taken.append)
    assert [certificate.look(), certificate.look()] == [True, False]
    pairs[0].write(folder)
    assert not certificate.look()
    assert len(taken) == 1


@pytest.mark.parametrize("days", [1, 30, 365 * 30])
def test_the_end_of_a_certificate_is_read(tmp_path: Path, days: int) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    ends = expires(make_pair(tmp_path, days).certificate.decode())
    assert before <= ends - timedelta(days=days) <= datetime.now(UTC)


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"])
def test_what_is_no_certificate_has_no_end(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # base64's or ours
        expires(text)


def test_the_names_are_those_of_a_tls_secret() -> None:
    assert (CERTIFICATE, KEY) == ("tls.crt", "tls.key")
