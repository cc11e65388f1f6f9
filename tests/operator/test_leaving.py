"""An operator that is told to stop leaves nothing for kopf to wait for, so that the Lease is free at once."""

import asyncio

import kopf
from kopf._core.intents.causes import Activity

from atelier_operator.main import register_end


class Resting:
    def __init__(self) -> None:
        self.rested = False

    async def rest(self) -> None:
        self.rested = True


def test_when_kopf_ends_its_flag_is_set_and_our_tasks_rest() -> None:
    async def end() -> None:
        registry, operator, stop = kopf.OperatorRegistry(), Resting(), asyncio.Event()
        register_end(registry, operator, stop)  # type: ignore[arg-type]
        (handler,) = registry._activities.get_all_handlers()
        assert handler.activity is Activity.CLEANUP
        await handler.fn()  # type: ignore[call-arg, misc]
        assert stop.is_set()
        assert operator.rested

    asyncio.run(end())
