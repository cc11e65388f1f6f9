"""The API server is busy, broken, away, forgetful or silent for one operator, and the runs come on.

A relay stands between the operator and a real API server; everybody else talks to the server itself.
"""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_proxy import ApiProxy, api_proxy
from atelier_api.exit_codes import ExitCode
from chart_release import chart_operator
from cluster.local import Cluster
from cluster_kinds import Make, Values, as_the_chart_allows
from fake_pods import both_pods, end_well, result
from operator_process import OperatorProcess, until

pytest_plugins = ("cluster_fixtures", "cluster_kinds")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400), as_the_chart_allows]

LEASE_SECONDS, SILENCE_SECONDS = 9, 12
"""Shorter than what the chart has by default: tests sit them out."""


@pytest.fixture(scope="module")
def operator_values() -> Values:
    return {"leaseSeconds": LEASE_SECONDS, "silenceSeconds": SILENCE_SECONDS}


@pytest.fixture(scope="module")
def relays(kind_cluster: Cluster) -> Iterator[tuple[ApiProxy, ApiProxy]]:
    with api_proxy(kind_cluster) as one, api_proxy(kind_cluster) as other:
        yield one, other


@pytest.fixture(scope="module")
def api_url(relays: tuple[ApiProxy, ApiProxy]) -> str:
    return relays[0].url


@pytest.fixture
def relay(relays: tuple[ApiProxy, ApiProxy]) -> Iterator[ApiProxy]:
    """The relay of the operator; after the test everything passes again."""
    yield relays[0]
    relays[0].faults.reset()


def said(operator: OperatorProcess, message: str) -> list[str]:
    """When it has logged a message."""
    lines = (json.loads(line) for line in operator.text().splitlines() if line.startswith("{"))
    return [line["time"] for line in lines if line["message"] == message]


def test_a_busy_server_is_asked_again_when_it_says(make: Make, relay: ApiProxy) -> None:
    asked = relay.faults.answer("POST", "jobsets", 429, times=2, retry_after=2)
    run = make()
    both_pods(run)
    assert len(asked.at) == 3
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(asked.at))
    assert len(run.objects("jobsets")) == 1


@pytest.mark.parametrize(
    ("verb", "part", "code"),
    [("POST", "jobsets", 500), ("POST", "configmaps", 503), ("PATCH", "status", 504)],
)
def test_a_server_that_fails_is_asked_again(make: Make, relay: ApiProxy, verb: str, part: str, code: int) -> None:
    asked = relay.faults.answer(verb, part, code, times=2)
    run = make()
    end_well(run)
    run.wait("Succeeded")
    assert len(asked.at) > 2
    assert run.status()["restarts"] == {"counted": 0, "uncounted": 0}


def test_the_server_is_away_for_longer_than_the_lease_lasts(
    make: Make, relay: ApiProxy, operator: OperatorProcess
) -> None:
    """Nothing is written meanwhile, and what has happened is found in the end."""
    run = make()
    pods = both_pods(run)
    run.wait("Preparing", "Starting")
    before = len(said(operator, "no leader any more"))
    relay.faults.offline = True
    relay.faults.cut()
    for pod in pods:
        run.end_pod(pod, 0, result(ExitCode.DONE))
    until(lambda: len(said(operator, "no leader any more")) > before, "the leader to give up")
    assert run.status()["phase"] == "Preparing"
    relay.faults.offline = False
    status = run.wait("Succeeded")
    assert (status["attempt"], status["restarts"]) == (1, {"counted": 0, "uncounted": 0})


def test_what_has_gone_while_nobody_watched_is_noticed(make: Make, relay: ApiProxy) -> None:
    """410 Gone: the operator has to list again, and a list does not tell what is missing from it."""
    run, other = make(), make("other")
    both_pods(run)
    both_pods(other)
    relay.faults.unwatched = True
    relay.faults.cut()
    run.cluster.kubectl("delete", "jobset", "run-1", "-n", run.namespace)
    other.delete()
    until(lambda: other.objects() == [], "everything of the other run to go")
    written = len(relay.writes)
    relay.faults.forget()
    relay.faults.unwatched = False
    until(lambda: run.status().get("attempt") == 2, "a second attempt")
    until(lambda: relay.faults.gone, "the server to say that the versions are gone")
    assert run.status()["restarts"]["counted"] == 1
    assert [write for write in relay.writes[written:] if write.made and write.name.startswith("other")] == []


def test_a_watch_that_stays_open_and_brings_nothing_is_opened_again(make: Make, relay: ApiProxy) -> None:
    run = make()
    pods = both_pods(run)
    run.wait("Preparing", "Starting")
    streams = relay.faults.silence()
    for pod in pods:
        run.end_pod(pod, 0, result(ExitCode.DONE))
    run.wait("Succeeded", seconds=SILENCE_SECONDS + 80)
    assert sum(stream.held for stream in streams) > 0


def test_of_two_replicas_only_the_one_that_leads_writes(
    make: Make, operator: OperatorProcess, relays: tuple[ApiProxy, ApiProxy], tmp_path: Path
) -> None:
    """The leader is frozen and thaws, then the next one is cut off: each time the other one takes over, and nobody writes after it."""
    first, second = relays
    stand_in = chart_operator(operator.cluster, tmp_path / "log", second.url).start()
    try:
        until(lambda: said(operator, "leader"), "the first to lead")
        both_pods(make("before"))
        assert second.writes == []

        assert operator.process is not None
        os.kill(operator.process.pid, signal.SIGSTOP)
        both_pods(make("frozen"))
        written, given_up = len(first.writes), len(said(operator, "no leader any more"))
        os.kill(operator.process.pid, signal.SIGCONT)
        until(lambda: len(said(operator, "no leader any more")) > given_up, "the first to notice")
        both_pods(make("thawed"))
        assert len(first.writes) == written

        led = len(said(operator, "leader"))
        second.faults.offline = True
        second.faults.cut()
        both_pods(make("cut-off"))
        assert len(said(operator, "leader")) == led + 1
        until(lambda: said(stand_in, "no leader any more"), "the second to notice")
        assert said(stand_in, "no leader any more")[-1] < said(operator, "leader")[-1]
    finally:
        second.faults.reset()
        stand_in.stop()
