"""Progress asked from agents: a real server on loopback that answers well, badly, slowly or not at all."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from atelier_api.progress import Progress
from atelier_operator import polling
from atelier_operator.polling import LARGEST_BYTES, Poller

KEY = ("art", "knight")
GOOD = Progress(stage="Training", step=7, total_steps=100)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Agent:
    """An agent on loopback, and the poller that asks it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[str] = []
        self.changed: list[Any] = []
        self.new = asyncio.Event()

    async def __aenter__(self) -> "Agent":
        app = web.Application()
        app.router.add_get("/{path}", self._serve)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self.poller = Poller(0.02, self._told, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.poller.close()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        return await self._answer(request)

    def _told(self, key: Any) -> None:
        self.changed.append(key)
        self.new.set()

    async def told(self) -> None:
        self.new.clear()
        await asyncio.wait_for(self.new.wait(), 10)


def with_agent(answer: Answer, story: Callable[[Agent], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Agent(answer) as agent:
            await story(agent)

    asyncio.run(run())


async def good(request: web.Request) -> web.StreamResponse:
    return web.Response(text=GOOD.model_dump_json(by_alias=True), content_type="application/json")


def test_a_good_answer_is_kept_for_its_life_and_told() -> None:
    async def story(agent: Agent) -> None:
        agent.poller.watch(KEY, "1.0", "127.0.0.1")
        await agent.told()
        assert agent.poller.latest(KEY, "1.0") == GOOD
        assert agent.poller.latest(KEY, "1.1") is None, "another life of the pods"
        assert agent.poller.latest(("art", "other"), "1.0") is None
        assert agent.changed[0] == KEY
        assert agent.asked[0] == "/progress"

    with_agent(good, story)


def test_a_run_is_asked_again_and_again_by_one_task() -> None:
    async def story(agent: Agent) -> None:
        for _ in range(5):
            agent.poller.watch(KEY, "1.0", "127.0.0.1")
        await agent.told()
        count = len(agent.asked)
        assert count == 1
        await agent.told()
        assert len(agent.asked) >= 2

    with_agent(good, story)


def test_a_run_without_node_0_keeps_its_answer_and_a_forgotten_one_does_not() -> None:
    async def story(agent: Agent) -> None:
        agent.poller.watch(KEY, "1.0", "127.0.0.1")
        await agent.told()
        agent.poller.watch(KEY, "1.0", None)
        count = len(agent.asked)
        await asyncio.sleep(0.1)
        assert len(agent.asked) == count
        assert agent.poller.latest(KEY, "1.0") == GOOD
        agent.poller.forget(KEY)
        assert agent.poller.latest(KEY, "1.0") is None

    with_agent(good, story)


def _body(data: bytes, status: int = 200, **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, status=status, headers=headers)

    return answer


async def redirected(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(LARGEST_BYTES // 1000 + 100):
        await response.write(b" " * 1000)
    return response


async def slow(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(1)
    return await good(request)


async def trickling(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(50):
        await response.write(b" ")
        await asyncio.sleep(0.1)
    return response


TEXT = GOOD.model_dump_json(by_alias=True).encode()
BAD: dict[str, Answer] = {
    "too large": _body(b" " * (LARGEST_BYTES + 1)),
    "large, then sound": _body(b" " * LARGEST_BYTES + TEXT),
    "without end": endless,
    "a redirect": redirected,
    "not JSON": _body(b"<html>"),
    "not text": _body(b"\xff\xfe\x00"),
    "no object": _body(b"[]"),
    "an unknown field": _body(json.dumps({"stage": "Training", "shell": "rm"}).encode()),
    "a wrong type": _body(b'{"step": "many"}'),
    "nested deeply": _body(b"[" * 60000),
    "an error": _body(TEXT, status=500),
    "not found": _body(TEXT, status=404),
    "compressed": _body(gzip.compress(TEXT), **{"Content-Encoding": "gzip"}),
    "slow to begin": slow,
    "slow to end": trickling,
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_an_answer_that_is_not_sound_is_none(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "TIMEOUT_SECONDS", 0.3)

    async def story(agent: Agent) -> None:
        assert await asyncio.wait_for(agent.poller._ask("127.0.0.1"), 3) is None
        assert agent.asked == ["/progress"], "asked once, and nothing else"

    with_agent(answer, story)


def test_the_largest_answer_is_taken() -> None:
    async def story(agent: Agent) -> None:
        assert await agent.poller._ask("127.0.0.1") == GOOD

    with_agent(_body(b" " * (LARGEST_BYTES - len(TEXT)) + TEXT), story)


def test_nobody_there_is_no_answer_and_no_error() -> None:
    async def story(agent: Agent) -> None:
        poller = Poller(0.02, agent.changed.append, 1)
        assert await poller._ask("127.0.0.1") is None
        assert await poller._ask("::1") is None
        assert await poller._ask("no host at all") is None
        await poller.close()

    with_agent(good, story)


def test_an_answer_that_comes_after_the_life_has_changed_is_dropped() -> None:
    release = asyncio.Event()

    async def late(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return await good(request)

    async def story(agent: Agent) -> None:
        agent.poller.watch(KEY, "1.0", "127.0.0.1")
        while not agent.asked:
            await asyncio.sleep(0.01)
        agent.poller.watch(KEY, "1.1", "127.0.0.1")
        release.set()
        await agent.told()
        assert agent.poller.latest(KEY, "1.0") is None
        assert agent.poller.latest(KEY, "1.1") == GOOD

    with_agent(late, story)
