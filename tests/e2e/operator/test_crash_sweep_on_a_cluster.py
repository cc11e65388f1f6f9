"""The operator is killed at every one of its writes to a real API server, and the run comes to the same end.

The other half of tests/operator/test_crash_sweep.py: here the garbage collector, the controllers of Jobs, JobSet and Kueue and
the watches are the real ones.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import pytest

from api_proxy import Aim, ApiProxy, Moment, Write, api_proxy
from chart_release import ACCOUNT, SYSTEM, Rights, install_chart
from cluster.local import Cluster
from swept_life import End, Life

pytest_plugins = ("cluster_fixtures",)
pytestmark = [pytest.mark.processes, pytest.mark.sweep, pytest.mark.timeout(2400)]

KILLS_OF_A_LIFE = 4
AT_A_TIME = int(os.environ.get("SWEEP_LIVES", "5"))


@dataclass(frozen=True)
class Lived:
    """What came of a life."""

    name: str
    end: End | None
    writes: tuple[Write, ...]
    struck: tuple[Write, ...]
    problem: str = ""


class Sweep:
    """Lives lives, some at a time."""

    def __init__(self, cluster: Cluster, proxies: list[ApiProxy], folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self.rights = Rights(cluster)
        self._token = cluster.kubectl("create", "token", ACCOUNT, f"-n={SYSTEM}", "--duration=1h").strip()
        self._free: Queue[ApiProxy] = Queue()
        for proxy in proxies:
            self._free.put(proxy)

    def all(self, blows: dict[str, Aim], moment: Moment) -> list[Lived]:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            return list(pool.map(lambda name: self.one(name, blows[name], moment), blows))

    def one(self, name: str, at: Aim, moment: Moment = "before") -> Lived:
        proxy = self._free.get()
        try:
            life = Life(self._cluster, name, proxy, self._token, self._folder)
            end, problem = None, ""
            try:
                end = life.live(at, moment)
            except AssertionError as error:
                problem = str(error)
            return Lived(name, end, tuple(proxy.writes), tuple(proxy.struck), problem)
        finally:
            self._free.put(proxy)


@pytest.fixture(scope="module")
def sweep(fake_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    install_chart(fake_cluster)
    with ExitStack() as stack:
        proxies = [stack.enter_context(api_proxy(fake_cluster)) for _ in range(AT_A_TIME)]
        yield Sweep(fake_cluster, proxies, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def undisturbed(sweep: Sweep) -> Lived:
    return sweep.one("undisturbed", Aim.nowhere())


def sentence(lived: Lived, expected: End | None) -> str:
    """What is wrong with a life; nothing when it ended as the undisturbed one."""
    if lived.problem:
        return f"{lived.name}: {lived.problem}"
    if lived.end == expected:
        return ""
    writes = "\n".join(map(str, lived.writes))
    return (
        f"{lived.name}, killed at {list(map(str, lived.struck))}: {lived.end}\ninstead of {expected}\nwrites:\n{writes}"
    )


def test_an_undisturbed_life_has_every_kind_of_write(undisturbed: Lived) -> None:
    assert undisturbed.problem == ""
    end = undisturbed.end
    assert end is not None
    assert (end.phase, end.restarts) == ("Succeeded", (1, 0))
    assert [reason for _, reason, _, _ in end.attempts] == ["Suspended", "Completed"]
    assert end.left == set()
    assert {number for _, _, number in end.made} == {1}
    assert {(each.verb, each.resource) for each in undisturbed.writes} == {
        *(("POST", "configmaps"), ("POST", "jobsets"), ("DELETE", "jobsets")),
        *(("PATCH", "trainingruns/status"), ("DELETE", "trainingruns")),
    }


@pytest.mark.parametrize("moment", ["before", "answered"])
def test_an_operator_that_is_killed_at_any_write_is_followed_by_one_that_goes_on(
    sweep: Sweep, undisturbed: Lived, moment: Moment
) -> None:
    """Every write of the undisturbed life by its number, a few of them in a life, far from each other. Lives differ in statuses of
    a moment, so a number is not always the same write: what none of them has struck of objects made and deleted is struck by its
    name."""
    count = len(undisturbed.writes)
    step = -(-count // KILLS_OF_A_LIFE)
    numbers = {first: range(first, count + 1, step) for first in range(1, step + 1)}
    lives = sweep.all({f"{moment}-{first}": Aim.numbered(*several) for first, several in numbers.items()}, moment)
    struck = {write.what for lived in lives for write in lived.struck}
    missing = {each.what for each in undisturbed.writes if not each.said} - struck
    named_lives = {f"{moment}-named-{place}": Aim.named(what) for place, what in enumerate(sorted(missing))}
    more = sweep.all(named_lives, moment)
    problems = [sentence(lived, undisturbed.end) for lived in [*lives, *more]]
    assert "\n".join(filter(None, problems)) == ""
    assert all(lived.struck for lived in more)
    killed = sum(len(lived.struck) for lived in lives)
    assert killed >= count - count // 4, f"{killed} kills of {count}: the lives were shorter"


def test_no_call_of_any_of_them_was_denied(sweep: Sweep) -> None:
    sweep.rights.check()
    assert sweep.rights.asked > 0
