"""An operator that is told to stop leaves nothing for kopf to wait for, so that the Lease is free at once."""

import asyncio

import kopf
from kopf._core.intents.causes import Activity

from atelier_operator.main import register_end


class Resting:
    def __init__(self) -> None:
        self.done: list[str] = []

    async def rest(self) -> None:
        self.done.append("rested")

    async def close_servers(self) -> None:
        self.done.append("closed")


def test_when_kopf_ends_its_flag_is_set_our_tasks_rest_and_our_servers_close() -> None:
    async def end() -> None:
        registry, operator, stop = kopf.OperatorRegistry(), Resting(), asyncio.Event()
        register_end(registry, operator, stop, operator.close_servers)  # type: ignore[arg-type]
        (handler,) = registry._activities.get_all_handlers()
        assert handler.activity is Activity.CLEANUP
        await handler.fn()  # type: ignore[call-arg, misc]
        assert stop.is_set()
        assert operator.done == ["rested", "closed"]

    asyncio.run(end())
