"""An HTTP relay before an S3 server that breaks what it is told to: the faults of a network and of a store.

Rules are added in the process (`proxy.fault(...)`) or over HTTP: `PUT /__fault` with a JSON list of rules, `GET /__log`.

    status      answer with an error instead of asking the server
    truncate    close the connection half way through the reply's body
    flip_resp   flip one bit of the reply's body
    flip_req    flip one bit of the request's body
    stall       wait before asking the server
    drop_req    close the connection instead of asking the server
    lost_reply  ask the server, then close the connection without its reply
"""

import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["status", "truncate", "flip_resp", "flip_req", "stall", "drop_req", "lost_reply"]
_HOP = {"connection", "transfer-encoding", "expect", "keep-alive"}


@dataclass
class Rule:
    """Break requests whose method and target match: the first `skip` are let through, the next `times` are broken."""

    do: Fault
    method: str | None = None
    match: str = ""
    skip: int = 0
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 1.0
    share: float = 1.0  # of the matching requests, drawn by the proxy's seeded generator


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    method: str
    target: str
    length: int
    headers: dict[str, str]


@dataclass
class FaultProxy:
    """The relay's rules and log. `url` takes the place of the server's."""

    upstream: str
    url: str = ""
    rules: list[Rule] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    broken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    draws: random.Random = field(default_factory=lambda: random.Random(0))

    def fault(self, do: Fault, **settings: object) -> Rule:
        """Add a rule."""
        rule = Rule(do, **settings)  # type: ignore[arg-type]
        self.rules.append(rule)
        return rule

    def count(self, method: str, match: str = "") -> int:
        """How many such requests arrived."""
        return sum(seen.method == method and match in seen.target for seen in self.seen)

    def pick(self, method: str, target: str) -> Rule | None:
        """The rule that breaks this request, counted."""
        with self.lock:
            for rule in self.rules:
                if rule.times <= 0 or (rule.method not in (None, method)) or rule.match not in target:
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                elif rule.share >= 1.0 or self.draws.random() < rule.share:
                    rule.times -= 1
                    self.broken += 1
                    return rule
        return None


@contextmanager
def fault_proxy(upstream: str, *, tls: ssl.SSLContext | None = None) -> Iterator[FaultProxy]:
    """A relay to `upstream` (http://host:port) on a free loopback port."""
    proxy = FaultProxy(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Relay", (_Relay,), {"proxy": proxy}))
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    proxy.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Relay(BaseHTTPRequestHandler):
    proxy: FaultProxy
    disable_nagle_algorithm = True  # else a reply's body waits 40 ms for its head to be acknowledged
    protocol_version = "HTTP/1.1"  # connections are kept, and `Expect: 100-continue` is answered here

    def _handle(self) -> None:
        body = self._read_body()
        if self.path.startswith("/__"):
            self._control(body)
            return
        self.proxy.seen.append(Seen(self.command, self.path, len(body), dict(self.headers)))
        rule = self.proxy.pick(self.command, self.path)
        do = rule.do if rule else None
        if rule and do == "status":
            text = f"<Error><Code>{rule.code}</Code><Message>made by the fault proxy</Message></Error>".encode()
            self._reply(rule.status, [("Content-Type", "application/xml")], text)
            return
        if do == "drop_req":
            self._hang_up()
            return
        if rule and do == "stall":
            time.sleep(rule.seconds)
        status, headers, reply = self._ask(_flipped(body) if do == "flip_req" else body)
        if do == "lost_reply":
            self._hang_up()
            return
        self._reply(status, headers, _flipped(reply) if do == "flip_resp" else reply, cut=do == "truncate")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        address = urlsplit(self.proxy.upstream)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP | {"content-length"}:
                    connection.putheader(name, value)  # with the client's Host, which is part of the signature
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            return reply.status, reply.getheaders(), reply.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def _control(self, body: bytes) -> None:
        if self.command == "PUT":
            self.proxy.rules[:] = [Rule(**rule) for rule in json.loads(body)]
            self._reply(200, [], b"")
        else:
            self._reply(200, [], json.dumps([vars(seen) for seen in self.proxy.seen]).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are in the proxy's own log."""


def _flipped(body: bytes) -> bytes:
    if not body:
        return body
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
