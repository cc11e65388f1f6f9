"""A relay between one operator and the API server that can kill the operator at one of its writes, or be at fault itself.

Everything passes as it comes: watches as streams, server-side applies, lists in pieces. Writes are counted and kept; those to
Leases and Events are not, since they come by the clock and decide nothing.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict
from yarl import URL

from api_faults import Faults
from cluster.local import Cluster

Moment = Literal["before", "answered"]
"""`before` the write reaches the server, or after the server has `answered` and before the operator is told."""

_HOP = {"host", "connection", "transfer-encoding", "keep-alive", "content-length", "expect"}
_NOT_COUNTED = {"leases", "events"}


@dataclass(frozen=True)
class Write:
    """A write of the operator. `said` is the phase and the reason of a status; `code` the server's answer, 0 without one."""

    verb: str
    resource: str
    name: str
    said: str = ""
    code: int = 0

    @property
    def what(self) -> tuple[str, str, str, str]:
        """The write, whatever came of it."""
        return self.verb, self.resource, self.name, self.said

    @property
    def made(self) -> bool:
        """Whether it has made an object."""
        return self.verb == "POST" and self.code == 201

    def __str__(self) -> str:
        return f"{self.verb} {self.resource} {self.name} {self.said}".rstrip() + f" -> {self.code or 'no answer'}"


@dataclass(frozen=True)
class Aim:
    """Writes at which to kill, so many of them: `meets` is told a write and its number in the life, from 1."""

    meets: Callable[[int, Write], bool]
    blows: int = 1

    @classmethod
    def numbered(cls, *numbers: int) -> "Aim":
        return cls(lambda number, _: number in numbers, len(numbers))

    @classmethod
    def named(cls, what: tuple[str, ...]) -> "Aim":
        return cls(lambda _, write: write.what == what)

    @classmethod
    def nowhere(cls) -> "Aim":
        return cls(lambda *_: False)


@dataclass
class ApiProxy:
    """A kubeconfig with `url` makes the operator come here. `aim` arms it; `struck` are the writes at which it has killed."""

    url: str = ""
    writes: list[Write] = field(default_factory=list)
    struck: list[Write] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    _aimed: Callable[[int, Write], bool] = lambda _, __: False
    _moment: Moment = "before"
    _kill: Callable[[], None] = lambda: None
    _blows: int = 1

    def aim(self, at: "Aim", moment: Moment, kill: Callable[[], None]) -> None:
        """Forget what was before; call `kill` at the first writes that are aimed at."""
        self.writes, self.struck = [], []
        self._aimed, self._blows, self._moment, self._kill = at.meets, at.blows, moment, kill

    def number(self, write: Write) -> bool:
        """Count a write; whether it is the one to strike at."""
        self.writes.append(write)
        if len(self.struck) < self._blows and self._aimed(len(self.writes), write):
            self.struck.append(write)
            return True
        return False

    def strike(self, moment: Moment) -> bool:
        """Kill the operator if this is the moment."""
        if moment != self._moment:
            return False
        self._kill()
        return True


@contextmanager
def api_proxy(cluster: Cluster) -> Iterator[ApiProxy]:
    """A relay on a free port, with a certificate that the cluster's own authority has signed. It runs in a thread of its own."""
    proxy, loop = ApiProxy(), asyncio.new_event_loop()
    relay = _Relay(proxy, cluster)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(relay.start(), loop).result(30)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(relay.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Relay:
    def __init__(self, proxy: ApiProxy, cluster: Cluster) -> None:
        self._proxy = proxy
        self._files = cluster.certificates

    async def start(self) -> None:
        trust = ssl.create_default_context(cafile=str(self._files.authority))
        # No decompression, no limit of connections or time: watches are long and many.
        self._session = ClientSession(
            connector=TCPConnector(ssl=trust, limit=0), timeout=ClientTimeout(total=None), auto_decompress=False
        )
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._relay)
        # A handler ends with its client, so that a killed operator's watches end as well.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        own.load_cert_chain(self._files.certificate("webhook"), self._files.key("webhook"))
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=own)
        await site.start()
        self._proxy.url = f"https://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        faults = self._proxy.faults
        if faults.refuses(request):
            return _hang_up(request)
        if (said := faults.given(request)) is not None:
            return said
        body = await request.read()
        write = _write(request.method, request.path, body)
        aimed = write is not None and self._proxy.number(write)
        place = len(self._proxy.writes) - 1
        if aimed and self._proxy.strike("before"):
            return _hang_up(request)
        url = faults.changed(URL(self._files.api_url + request.raw_path, encoded=True))
        asked = self._session.request(request.method, url, headers=_kept(request.headers), data=body or None)
        async with asked as answer:
            if write is not None:
                self._proxy.writes[place] = Write(*write.what, answer.status)
            if aimed:
                await answer.read()
                if self._proxy.strike("answered"):
                    return _hang_up(request)
            response = web.StreamResponse(status=answer.status, headers=_kept(answer.headers))
            await response.prepare(request)
            if "watch" in request.query:
                with faults.watched(request) as stream:
                    async for chunk in answer.content.iter_any():
                        if faults.passes(stream, chunk):
                            await response.write(chunk)
            else:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            await response.write_eof()
            return response


def _hang_up(request: web.Request) -> web.Response:
    """No answer: who asked is dead."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=503)


def _kept(headers: Any) -> "CIMultiDict[str]":
    """The headers that are not about the connection."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP)


def _write(verb: str, path: str, body: bytes) -> Write | None:
    """The write that a request is, if it is one that counts: /apis/<group>/<version>/namespaces/<namespace>/<resource>[/…]."""
    parts = path.strip("/").split("/")
    if verb in ("GET", "HEAD") or "namespaces" not in parts:
        return None
    resource, *rest = parts[parts.index("namespaces") + 2 :]
    if resource in _NOT_COUNTED:
        return None
    document = json.loads(body or "{}")
    status = document.get("status") or {}
    said = f"{status.get('phase')}/{status.get('reason')}" if status else ""
    name = rest[0] if rest else document["metadata"]["name"]
    return Write(verb, "/".join([resource, *rest[1:]]), name, said)
