"""`atelier status`, `logs`, `stop`, `resume` and `delete` with JobSet and without. With Kueue: test_cli_on_a_cluster.py."""

import pytest

from atelier_api.exit_codes import ExitCode
from cluster_cli import Place, atelier, errors
from cluster_kinds import NEITHER, NO_KUEUE, Engines, as_the_chart_allows, on
from fake_pods import both_pods
from operator_process import until

pytest_plugins = ("cluster_fixtures", "cluster_kinds", "cluster_cli")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400), on(NO_KUEUE, NEITHER), as_the_chart_allows]


# --- status, logs -----------------------------------------------------------------------------------------------------


def test_status_of_a_namespace_of_a_run_and_of_all(place: Place, engines: Engines) -> None:
    assert place.atelier("status").stdout == f"no runs in namespace {place.namespace}\n"
    place.submit()
    both_pods(place.run)
    place.run.wait("Preparing", "Starting")
    heading, line = place.atelier("status").stdout.splitlines()
    assert heading.split() == ["name", "phase", "step", "loss", "left", "queue", "restarts"]
    assert line.split() == ["run", "Preparing", "0"]
    everywhere = atelier(place.cluster, "status", "-A").stdout.splitlines()
    assert [place.namespace, "run", "Preparing", "0"] in [each.split() for each in everywhere]
    one = place.atelier("status", "run").stdout
    plan = f"ddp, 2 processes, as {engines.backend}"
    for text in ("phase", "Preparing: ", plan, "Accepted", "Valid", "s3://bucket/runs/"):
        assert text in one


def test_a_log_that_the_node_does_not_give_is_one_sentence(place: Place) -> None:
    place.submit()
    pod = both_pods(place.run)[1]
    ended = place.atelier("logs", "run", "--node", "1")
    assert ended.returncode == 69
    (said,) = errors(ended)
    assert said.startswith(f"node {pod['spec']['nodeName']} does not give the log of pod {pod['metadata']['name']}: ")
    (said,) = errors(place.atelier("logs", "run", "--node", "2"))
    assert said == "--node is 2; run run has pods of the nodes 0, 1"


def test_a_run_without_pods_says_where_its_logs_are(place: Place) -> None:
    place.submit(schedule={"suspend": True})
    place.run.wait("Suspended")
    (said,) = errors(place.atelier("logs", "run"))
    assert said == "run run has no pods now, it is Suspended"
    place.atelier("resume", "run")
    both_pods(place.run)
    place.atelier("stop", "run")
    place.run.wait("Suspended", "Requested")
    (said,) = errors(place.atelier("logs", "run"))
    assert "; what earlier ones have logged is in s3://bucket/runs/" in said


# --- stop, resume, delete ---------------------------------------------------------------------------------------------


def test_stop_and_resume(place: Place) -> None:
    place.submit()
    both_pods(place.run)
    assert "has not been stopped; it is Preparing" in place.atelier("resume", "run").stdout
    assert "is being stopped, with a checkpoint" in place.atelier("stop", "run").stdout
    place.run.wait("Suspended", "Requested")
    assert "is stopped already" in place.atelier("stop", "run").stdout
    ended = place.atelier("submit", str(place.file))
    assert "it is stopped (spec.schedule.suspend)" in ended.stdout, "a file that does not say so wakes nothing"
    followed = place.atelier("run", "--on", "cluster", str(place.file))
    assert followed.returncode == 75
    assert "run run is stopped; `atelier resume run" in followed.stdout
    assert "goes on as soon as there is room" in place.atelier("resume", "run").stdout
    both_pods(place.run)
    until(lambda: place.run.status()["attempt"] == 2, "the status to say that it is the second attempt")
    place.end(ExitCode.DONE)
    place.run.wait("Succeeded")
    ended = place.atelier("stop", "run")
    assert (ended.returncode, errors(ended)) == (64, ["run run has succeeded; there is nothing to stop"])


def test_delete_asks(place: Place) -> None:
    place.submit()
    both_pods(place.run)
    ended = place.atelier("delete", "run", answer="n\n")
    assert ended.returncode == 1
    assert f"run run in namespace {place.namespace} is Preparing; delete it?" in ended.stdout
    assert place.run.get()
    ended = place.atelier("delete", "run", "-y")
    assert ended.stdout.startswith("run run is deleted; what it made stays in s3://bucket/runs/")
    until(lambda: place.run.objects() == [], "everything to go")
