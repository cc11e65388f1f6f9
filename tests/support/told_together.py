"""Stories of runs on one cluster that are told at the same time: most of each is waiting for controllers.

A module takes `pytest_plugins = (..., "told_together")`, says `on(...)` for each test, and puts `@together` on a function of `make`
and, if it likes, `engines`. The first such test on a kind of cluster starts those of all, a few at a time; each then gives what came
of its own. Tests that stop the operator or take its rights away come after them in the module.
"""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cluster_kinds import Engines, making
from operator_process import OperatorProcess

Story = Callable[..., None]

AT_A_TIME = 8


class Stories:
    """What comes of the stories of a module on a kind of cluster."""

    def __init__(self, told: dict[str, "Future[None]"]) -> None:
        self._told = told

    def outcome(self, name: str) -> None:
        """Waits for the end of a story; raises what it has raised."""
        self._told[name].result()


def together(story: Story) -> Callable[[Stories], None]:
    """The test of a story."""
    name = story.__name__

    def test(stories: Stories) -> None:
        stories.outcome(name)

    test.__name__, test.__qualname__, test.__module__, test.__doc__ = name, name, story.__module__, story.__doc__
    test.story = story  # type: ignore[attr-defined]
    return test


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest, operator: OperatorProcess, engines: Engines) -> Iterator[Stories]:
    def tell(story: Story, namespace: str) -> None:
        with making(operator.cluster, namespace) as make:
            known: dict[str, Any] = {"make": make, "engines": engines}
            story(**{name: known[name] for name in inspect.signature(story).parameters})

    pool = ThreadPoolExecutor(AT_A_TIME)
    told = {
        name: pool.submit(tell, story, f"s{number}")
        for number, (name, story) in enumerate(_chosen(request, engines).items())
    }
    yield Stories(told)
    pool.shutdown(cancel_futures=True)


def _chosen(request: pytest.FixtureRequest, engines: Engines) -> dict[str, Story]:
    """The module's stories that are to be told on this kind of cluster."""
    items = [each for each in request.session.items if isinstance(each, pytest.Function)]
    here = [each for each in items if each.path == request.path and each.callspec.params["engines"] == engines]
    return {each.function.__name__: each.function.story for each in here if hasattr(each.function, "story")}
