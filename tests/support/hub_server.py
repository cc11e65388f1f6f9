"""A hub for tests: an HTTP server on a loopback port that speaks what huggingface_hub asks of one, over folders of this machine.

Model information, the tree of a commit, files with ETag, commit and ranges, repositories that are gated, and on request a connection
that breaks off in the middle of a file. Every request is kept, so that a test can tell what was fetched.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_of_the_account_that_accepted"
LARGE_BYTES = 16 << 10
"""Files from this size on are listed with their SHA-256, as files in git-lfs are."""
CHUNK = 64 << 10
_PATHS = {
    "info": re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/?]+))?"),
    "tree": re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/?]+)/?"),
    "file": re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"),
}


@dataclass
class HubRepository:
    """A repository of one commit. `revisions` are the branches and tags that name it."""

    folder: Path
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)

    @cached_property
    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    @cached_property
    def commit(self) -> str:
        content = "".join(f"{name} {_hash(data)}\n" for name, data in self.files.items())
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Hub:
    """The server. `broken` files break off after so many bytes, as often as told; `status` answers everything with an error."""

    url: str = ""
    repositories: dict[str, HubRepository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each request."""
    broken: dict[str, list[int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    status: int | None = None
    stalled: threading.Event | None = None
    """Files stop in their middle until it is set."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client process needs in its environment."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fetched(self) -> list[str]:
        """Files whose content was asked for."""
        found = (_PATHS["file"].fullmatch(path) for method, path, _ in self.requests if method == "GET")
        return sorted(match["file"] for match in found if match)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub without repositories, ended afterwards."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        if hub.stalled is not None:
            hub.stalled.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _hash(data: bytes) -> str:
    """The hash that the hub gives as ETag: SHA-256 of large files, git's of small ones."""
    if len(data) >= LARGE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return _git_hash(data)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    disable_nagle_algorithm = True  # else a reply's body waits 40 ms for its head to be acknowledged
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(
            BrokenPipeError, ConnectionResetError, ValueError
        ):  # clients that are killed, connections that we break off
            super().handle()

    def log_message(self, *_: object) -> None:
        """No lines among those of the tests."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            return self._refuse(self.hub.status, "", "the hub is down")
        for kind in ("tree", "info", "file"):
            if match := _PATHS[kind].fullmatch(path):
                break
        else:
            return self._refuse(404, "", "no such path")
        repository = self.hub.repositories.get(match["repo"])
        if repository is None:
            return self._refuse(401, "RepoNotFound", "Repository not found")
        revision = (match["revision"] or "main").replace("%2F", "/")
        if revision != repository.commit and revision not in repository.revisions:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if kind == "info":
            return self._json(
                {
                    "id": match["repo"],
                    "sha": repository.commit,
                    "siblings": [{"rfilename": n} for n in repository.files],
                }
            )
        if kind == "tree":
            return self._json([_entry(name, data) for name, data in repository.files.items()])
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(
                403 if "Authorization" in self.headers else 401, "GatedRepo", "Access to the model is restricted"
            )
        return self._file(repository, match["file"])

    def _file(self, repository: HubRepository, name: str) -> None:
        data = repository.files.get(name)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        etag = _hash(data)
        if name in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(asked[1])
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self._send(name, data[start:])

    def _send(self, name: str, data: bytes) -> None:
        limits = self.hub.broken.get(name, [])
        limit = limits.pop(0) if limits else None
        for position in range(0, len(data), CHUNK):
            if limit is not None and position >= limit:
                self.close_connection = True
                return
            if self.hub.stalled is not None and position >= len(data) // 2 and len(data) >= LARGE_BYTES:
                self.hub.stalled.wait()
            self.wfile.write(data[position : position + CHUNK])
            self.wfile.flush()

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if len(data) >= LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
