"""`atelier submit --follow` and `atelier install-check` against real API servers."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atelier_api.exit_codes import MEANINGS, ExitCode
from cluster.local import Cluster
from cluster_cli import Ended, Place, atelier, command, errors, run_with
from cluster_documents import PROFILE, queues
from cluster_kinds import as_the_chart_allows
from fake_pods import both_pods
from operator_process import OperatorProcess, install_crds, until

pytest_plugins = ("cluster_fixtures", "cluster_kinds", "cluster_cli")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400), as_the_chart_allows]


# --- follow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def following(place: Place) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    started = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        line, environment = command(place.cluster.environment, *arguments, str(place.file), "-n", place.namespace)
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_followed_to_its_success(place: Place, following: Callable[..., "subprocess.Popen[str]"]) -> None:
    place.write()
    process = following("submit", "--follow")
    assert process.stdout is not None
    assert any(line.startswith("Preparing (Starting): ") for line in process.stdout)
    place.end(ExitCode.DONE)
    out, error = process.communicate(timeout=90)
    assert (process.returncode, error) == (0, "")
    assert "Succeeded (Completed): trained and published" in out
    assert "results  s3://bucket/runs/" in out


@pytest.mark.parametrize("code", [ExitCode.DATA, ExitCode.DIVERGED])
def test_followed_to_its_failure(
    place: Place, following: Callable[..., "subprocess.Popen[str]"], code: ExitCode
) -> None:
    place.write()
    process = following("run", "--on", "cluster", "--quiet")
    place.end(code, "because")
    out, error = process.communicate(timeout=90)
    assert (process.returncode, out) == (int(code), "")
    assert error == f"error: run run has failed ({MEANINGS[code].reason}): node 0: because\n"


def test_restarts_that_are_used_up_end_with_the_code_of_the_last(
    place: Place, following: Callable[..., "subprocess.Popen[str]"]
) -> None:
    place.write(retry={"maxRestarts": 0})
    process = following("submit", "--follow")
    place.end(ExitCode.INTERNAL)
    out, error = process.communicate(timeout=90)
    assert process.returncode == 70
    assert "run run has failed (MaxRestarts)" in error
    assert f"atelier logs run -n {place.namespace}" in out


def test_a_run_that_cannot_begin_is_not_waited_for(place: Place) -> None:
    place.write(storage={"uri": "runs/here"})
    ended = place.atelier("run", "--on", "cluster", str(place.file))
    assert ended.returncode == 64
    (said,) = errors(ended)
    assert said.startswith("run run cannot begin (InvalidSpec): spec.storage.uri is 'runs/here'")


def test_a_run_that_is_deleted_while_it_is_followed(
    place: Place, following: Callable[..., "subprocess.Popen[str]"]
) -> None:
    place.write()
    process = following("submit", "--follow")
    both_pods(place.run)
    place.run.delete()
    _, error = process.communicate(timeout=90)
    assert (process.returncode, error) == (64, "error: run run has been deleted by somebody\n")


# --- install-check ----------------------------------------------------------------------------------------------------


def findings(ended: Ended) -> dict[str, str]:
    """Verdict by what was looked at."""
    return {parts[1]: parts[0] for parts in map(str.split, ended.stdout.splitlines()[1:])}


def test_a_cluster_that_has_everything(place: Place) -> None:
    place.cluster.apply(queues(place.namespace, 8))
    ended = place.atelier("install-check")
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert set(findings(ended).values()) == {"ok"}
    assert "32 nvidia.com/gpu on 4 nodes" in ended.stdout
    assert f"queues of namespace {place.namespace}: gpu" in ended.stdout
    assert place.atelier("install-check", "--quiet").stdout == ""


def test_a_namespace_without_a_queue(place: Place) -> None:
    ended = place.atelier("install-check")
    assert ended.returncode == 0
    assert findings(ended)["Kueue"] == "optional"


def test_an_artist_may_not_see_all_of_it_and_is_told(place: Place) -> None:
    rules = {"apiGroups": ["atelier.dev"], "resources": ["trainingruns"], "verbs": ["get", "list", "create", "patch"]}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "rules": [rules]}
    place.cluster.apply(
        [role | {"metadata": {"name": "artist", "namespace": place.namespace}}, *queues(place.namespace, 8)]
    )
    names = ("create", "rolebinding", "artist", "--role=artist", f"--serviceaccount={place.namespace}:default")
    place.cluster.kubectl(*names, "-n", place.namespace)
    kubeconfig = place.cluster.kubeconfig_of_service_account(place.namespace, "default")
    ended = place.atelier("install-check", kubeconfig=kubeconfig)
    assert ended.returncode == 1
    found = findings(ended)
    assert (found["operator"], found["profiles"], found["rights"]) == ("unknown", "unknown", "missing")
    assert "you may not delete trainingruns" in ended.stdout
    refused = atelier(place.cluster, "status", "-A", kubeconfig=kubeconfig)
    assert refused.returncode == 77
    (said,) = errors(refused)
    assert said.startswith("the cluster does not allow it: trainingruns.atelier.dev is forbidden")


def test_a_cluster_that_has_nothing(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """Neither our kinds nor JobSet nor Kueue; then the kinds; then an operator that has stopped; then no cluster at all."""
    with start_cluster(jobset=False, kueue=False) as cluster:
        ended = atelier(cluster, "install-check")
        assert (ended.returncode, findings(ended)) == (1, {"TrainingRun": "missing"})
        ended = atelier(cluster, "status")
        missing = "the cluster has no such kind: Atelier is not installed there (see `atelier install-check`)"
        assert (ended.returncode, errors(ended)) == (64, [missing])

        install_crds(cluster)
        ended = atelier(cluster, "install-check")
        assert ended.returncode == 1
        expected = {"operator": "missing", "profiles": "missing", "JobSet": "optional", "Kueue": "optional"}
        assert findings(ended) == expected | {"TrainingRun": "ok", "rights": "ok"}
        assert "it has never run" in ended.stdout

        cluster.apply(PROFILE)
        operator = OperatorProcess(cluster, tmp_path / "log").start()
        until(lambda: '"leader"' in operator.text(), "the operator's Lease")
        found = findings(atelier(cluster, "install-check"))
        assert (found["operator"], found["GPUs"]) == ("ok", "missing")
        operator.stop()
        assert "it has let go of its Lease: it was stopped" in atelier(cluster, "install-check").stdout

        port = int(cluster.certificates.api_url.rpartition(":")[2])
        cluster.kill("apiserver")
        until(lambda: not cluster.network.accepts(port), "its port to be closed")
        for arguments in (["status"], ["install-check"], ["stop", "run"]):
            ended = atelier(cluster, *arguments)
            assert (ended.returncode, ended.stdout) == (69, "")
            (said,) = errors(ended)
            assert said.startswith("the cluster does not answer: ")
            assert said.endswith("[Errno 111] Connection refused")


# --- no way to a cluster ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "No configuration found"), (["--context", "elsewhere"], "elsewhere")],
    ids=["no kubeconfig", "no such context"],
)
def test_no_cluster_to_talk_to(fake_cluster: Cluster, tmp_path: Path, arguments: list[str], words: str) -> None:
    there = fake_cluster.kubeconfig if arguments else tmp_path / "none"
    ended = run_with({"KUBECONFIG": str(there)}, "status", *arguments)
    assert ended.returncode == 64
    (said,) = errors(ended)
    assert said.startswith("there is no cluster to talk to: ")
    assert words in said
