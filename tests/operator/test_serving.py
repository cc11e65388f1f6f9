"""Metrics and probes come out of the event loop: they fall silent with it."""

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from atelier_operator.metrics import Metrics
from atelier_operator.serving import plain_app, served


class Loop:
    """The server in an event loop of a thread, which can be blocked as a coroutine that never awaits blocks it."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ready = False
        self._loop = asyncio.new_event_loop()
        self._bound: asyncio.Future[int] = self._loop.create_future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        async with served(plain_app(self.metrics.registry, lambda: self.ready), 0) as port:
            self._bound.set_result(port)
            await self._stop.wait()

    def start(self) -> None:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._port(), self._loop).result(30)

    async def _port(self) -> int:
        return await self._bound

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def call(self, function: Callable[[], Any]) -> None:
        self._loop.call_soon_threadsafe(function)

    def get(self, path: str, seconds: float = 30, host: str = "127.0.0.1", **headers: str) -> tuple[int, str, Any]:
        """Status, text and headers."""
        request = urllib.request.Request(f"http://{host}:{self.port}{path}", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=seconds) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    loop.start()
    yield loop
    loop.stop()


def test_a_loop_that_hangs_is_not_alive(loop: Loop) -> None:
    assert loop.get("/healthz")[0] == 200
    go_on, hangs = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        go_on.wait(60)

    loop.call(hang)
    try:
        assert hangs.wait(30)
        for path in ("/healthz", "/readyz", "/metrics"):
            with pytest.raises(TimeoutError):
                loop.get(path, seconds=0.5)
    finally:
        go_on.set()
    assert loop.get("/healthz")[0] == 200


def test_it_is_ready_once_everything_has_been_read(loop: Loop) -> None:
    status, text, _ = loop.get("/readyz")
    assert status == 503
    assert "have not all been read" in text
    assert loop.get("/healthz")[0] == 200
    loop.ready = True
    assert loop.get("/readyz")[0] == 200


TYPES = {
    "anybody": ("*/*", "text/plain; version="),
    "Prometheus": (
        "application/openmetrics-text;version=1.0.0,text/plain;q=0.1",
        "application/openmetrics-text; version=1.0.0",
    ),
}


@pytest.mark.parametrize(("accepted", "sent"), TYPES.values(), ids=TYPES)
def test_metrics_are_told_in_the_format_that_is_asked_for(loop: Loop, accepted: str, sent: str) -> None:
    loop.metrics.leader(True)
    status, text, headers = loop.get("/metrics", Accept=accepted)
    assert status == 200
    assert headers["Content-Type"].startswith(sent)
    assert "charset=utf-8" in headers["Content-Type"]
    assert "atelier_operator_leader 1.0" in text.splitlines()


def test_it_listens_on_both_kinds_of_addresses(loop: Loop) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    assert loop.get("/healthz", host="[::1]")[0] == 200


def test_a_port_that_is_taken_is_an_error(loop: Loop) -> None:
    async def second() -> None:
        async with served(plain_app(loop.metrics.registry, lambda: True), loop.port):
            raise AssertionError("it serves on a port that is taken")

    with pytest.raises(OSError, match="in use"):
        asyncio.run(second())
