"""What a relay before the API server does to what passes: refuses it, answers in the server's place, cuts watches or lets them go
silent. Set from the test's thread, done in the relay's."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from yarl import URL


@dataclass
class Answered:
    """Requests of a verb for a kind, of which the first `times` get `code`. `at` holds when each came, on the monotonic clock."""

    verb: str
    part: str
    code: int
    times: int
    retry_after: int = 0
    at: list[float] = field(default_factory=list)

    def of(self, request: web.Request) -> web.Response | None:
        """The answer, if it is ours to give."""
        if request.method != self.verb or self.part not in request.path.split("/"):
            return None
        self.at.append(time.monotonic())
        if len(self.at) > self.times:
            return None
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return web.json_response({"kind": "Status", "message": "by the test"}, status=self.code, headers=headers)


@dataclass(eq=False)
class Stream:
    """A watch that is open. `silent`: it stays so and nothing passes any more, of which there were `held` pieces."""

    request: web.Request
    loop: asyncio.AbstractEventLoop
    silent: bool = False
    held: int = 0

    def cut(self) -> None:
        """Break the connection."""
        if (transport := self.request.transport) is not None:
            self.loop.call_soon_threadsafe(transport.abort)


class Faults:
    """`offline`: nothing passes. `unwatched`: no watch is opened. `gone` counts the watches to which the server has said that
    their version is gone."""

    def __init__(self) -> None:
        self.offline = self.unwatched = False
        self.gone = 0
        self._forgotten: set[str] | None = None
        self._answers: list[Answered] = []
        self._streams: set[Stream] = set()

    def reset(self) -> None:
        """Let everything pass again."""
        self.offline = self.unwatched = False
        self._forgotten = None
        self._answers = []
        for stream in list(self._streams):
            stream.silent = False

    def forget(self) -> None:
        """Ask for the next watch of each kind from the first of all versions, which the server does not know any more."""
        self.gone, self._forgotten = 0, set()

    def answer(self, verb: str, part: str, code: int, times: int, retry_after: int = 0) -> Answered:
        """Answer the next requests with that part of a path in the server's place."""
        self._answers.append(Answered(verb, part, code, times, retry_after))
        return self._answers[-1]

    def cut(self) -> None:
        """Break all watches."""
        for stream in list(self._streams):
            stream.cut()

    def silence(self) -> list[Stream]:
        """Let the watches that are open bring nothing any more; those that come later do."""
        silenced = list(self._streams)
        for stream in silenced:
            stream.silent = True
        return silenced

    # --- for the relay ---------------------------------------------------------------------------------------------------

    def refuses(self, request: web.Request) -> bool:
        """Whether there is to be no answer."""
        return self.offline or (self.unwatched and "watch" in request.query)

    def given(self, request: web.Request) -> web.Response | None:
        """The answer in the server's place, if there is one."""
        return next((said for each in self._answers if (said := each.of(request)) is not None), None)

    def changed(self, url: URL) -> URL:
        """What is asked of the server instead."""
        if self._forgotten is None or "watch" not in url.query or url.path in self._forgotten:
            return url
        self._forgotten.add(url.path)
        return url.update_query(resourceVersion="1")

    @contextmanager
    def watched(self, request: web.Request) -> Iterator[Stream]:
        """A watch, while it is open."""
        stream = Stream(request, asyncio.get_running_loop())
        self._streams.add(stream)
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    def passes(self, stream: Stream, chunk: bytes) -> bool:
        """Whether a piece of a watch reaches the operator."""
        self.gone += b'"code":410' in chunk
        stream.held += stream.silent
        return not stream.silent
