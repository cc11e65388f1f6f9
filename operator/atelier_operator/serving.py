"""HTTP servers in the operator's own event loop, and the one for metrics and probes.

They answer only while the loop runs, which is what a liveness probe is to find out: a server in a thread of its own, as
prometheus_client brings one, goes on while nothing else does.
"""

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

KEEP_ALIVE_SECONDS = 120.0
"""Longer than the 90 s after which Go's clients, such as the API server, give an idle connection up: so it is they who close it."""


def plain_app(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> web.Application:
    """/metrics; /healthz: the loop runs; /readyz: `is_ready`."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if is_ready():
            return web.Response(text="ok\n")
        return web.Response(text="the objects of the cluster have not all been read yet\n", status=503)

    app = web.Application()
    app.router.add_get("/metrics", make_aiohttp_handler(registry))
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


@contextlib.asynccontextmanager
async def served(app: web.Application, port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve on all addresses, and give the port; 0 is any that is free. Raises OSError when it is taken."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=KEEP_ALIVE_SECONDS, shutdown_timeout=1.0)
    await runner.setup()
    try:
        listening = _listening(port)
        await web.SockSite(runner, listening, ssl_context=tls).start()
        yield int(listening.getsockname()[1])
    finally:
        await runner.cleanup()


def _listening(port: int) -> socket.socket:
    """IPv6 and IPv4 on one socket, or IPv4 alone where the machine has no other."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
