"""`atelier submit` against a real API server with an operator; what follows it is in test_cli_on_every_cluster.py."""

from pathlib import Path

import pytest
import yaml

from cluster_cli import Place, atelier, errors
from cluster_documents import PROFILE, queues
from cluster_kinds import as_the_chart_allows
from fake_pods import both_pods
from operator_process import ClusterRun, until

pytest_plugins = ("cluster_fixtures", "cluster_kinds", "cluster_cli")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400), as_the_chart_allows]

ROOT = Path(__file__).resolve().parents[3]
ACCEPTED = ("Queued", "Preparing", "Running")


# --- submit -----------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_as_its_file_says(place: Place) -> None:
    place.write(hyperparameters={"learningRate": 1e-5, "gradientClip": None, "microBatchSize": None})
    ended = place.started("submit", str(place.file))
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert f"run run is in namespace {place.namespace}" in ended.stdout
    spec = place.run.get()["spec"]
    assert spec["hyperparameters"]["learningRate"] == "1e-05"
    assert "gradientClip" not in spec["hyperparameters"] or spec["hyperparameters"]["gradientClip"] is None
    place.run.wait("Preparing")


def test_a_field_that_is_left_out_again_gets_its_default(place: Place) -> None:
    place.submit(profileRef={"name": "none"}, retry={"maxRestarts": 7})
    assert place.run.get()["spec"]["retry"]["maxRestarts"] == 7
    place.submit(profileRef={"name": "none"})
    assert place.run.get()["spec"]["retry"]["maxRestarts"] == 3


def test_a_bad_file_is_told_a_line_a_mistake_and_makes_nothing(place: Place) -> None:
    place.write(hyperparameters={"steps": 0}, adapter={"rank": 0})
    ended = place.atelier("submit", str(place.file))
    assert ended.returncode == 64
    said = errors(ended)
    assert len(said) == 2
    assert any("spec.adapter.rank is 0; must be 1–1024" in line for line in said)
    assert any("spec.hyperparameters.steps is 0" in line for line in said)
    assert place.cluster.kubectl("get", "trun", "-n", place.namespace, "-o", "name") == ""


def test_what_may_not_change_in_a_started_run_is_told_by_the_api_server(place: Place) -> None:
    place.submit()
    both_pods(place.run)
    place.write(adapter={"rank": 8}, hyperparameters={"seed": 7})
    ended = place.atelier("submit", str(place.file))
    assert ended.returncode == 64
    fixed = "cannot change once the run has been started; make a new run"
    assert sorted(errors(ended)) == [f"spec.adapter: {fixed}", f"spec.hyperparameters.seed: {fixed}"]
    place.submit(hyperparameters={"steps": 20})
    assert place.run.get()["spec"]["hyperparameters"]["steps"] == 20


def test_a_namespace_that_is_not_there(place: Place) -> None:
    place.write()
    ended = atelier(place.cluster, "submit", str(place.file), "-n", "nowhere")
    assert (ended.returncode, errors(ended)) == (64, ['namespaces "nowhere" not found'])


EXAMPLES = sorted((ROOT / "examples" / "cluster").glob("*.yaml"))


def test_the_api_server_takes_the_examples(place: Place) -> None:
    for file in EXAMPLES:
        ended = place.atelier("submit", str(file), "--set", "profileRef.name=none")
        assert (ended.returncode, ended.stderr) == (0, ""), file
    for file in EXAMPLES:
        name = yaml.safe_load(file.read_text())["metadata"]["name"]
        ClusterRun(place.cluster, place.namespace, name).wait("Pending", "ProfileNotFound")


def test_the_operator_runs_the_examples(place: Place) -> None:
    """With a profile that has what their page asks for: none is refused."""
    profile = PROFILE["spec"] | {"storage": {"uri": "s3://runs"}}
    own = {
        "apiVersion": PROFILE["apiVersion"],
        "kind": "TrainingProfile",
        "metadata": {"name": "own", "namespace": place.namespace},
        "spec": profile,
    }
    place.cluster.apply([own, *queues(place.namespace, 32)])
    change = ("--set", "profileRef.kind=TrainingProfile", "--set", "profileRef.name=own")
    for file in EXAMPLES:
        assert place.atelier("submit", str(file), *change).returncode == 0
        name = yaml.safe_load(file.read_text())["metadata"]["name"]
        run = ClusterRun(place.cluster, place.namespace, name)
        until(lambda run=run: run.status().get("phase") in ACCEPTED, f"{name} to be accepted")
        assert run.condition("Accepted")["status"] == "True"
        assert run.condition("Fits")["status"] != "False"


# --- no such run --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_there(place: Place) -> None:
    """One of them as a user starts it; all are one module, which the others are called from in the test's own process."""
    for verb in ("status", "logs", "stop", "resume", "delete"):
        ended = place.started("delete", "none") if verb == "delete" else place.atelier(verb, "none")
        assert ended.returncode == 64
        assert errors(ended) == [
            f"there is no run none in namespace {place.namespace}; `atelier status -A` lists those of all namespaces"
        ]
