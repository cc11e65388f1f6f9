"""`atelier` against a real API server, with an operator and pods whose ends are told as a kubelet would tell them.

The command runs as a process of its own, as a user's does: the client reads KUBECONFIG when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from atelier_api.exit_codes import MEANINGS, ExitCode
from cluster.local import Cluster
from cluster_documents import PROFILE, queues, run_document
from operator_process import ClusterRun, OperatorProcess, install_crds, until

pytest_plugins = ("cluster_fixtures",)
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]

ROOT = Path(__file__).resolve().parents[3]
Object = dict[str, Any]
Ended = subprocess.CompletedProcess[str]
ACCEPTED = ("Queued", "Preparing", "Running")


def command(environment: Mapping[str, str], *arguments: str) -> tuple[list[str], dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG",)}
    return [sys.executable, "-m", "atelier_cli.main", *arguments], {**kept, **environment}


def atelier(cluster: Cluster, *arguments: str, answer: str = "") -> Ended:
    """The command with the administrator's kubeconfig."""
    return run_with(cluster.environment, *arguments, answer=answer)


def run_with(environment: Mapping[str, str], *arguments: str, answer: str = "") -> Ended:
    line, variables = command(environment, *arguments)
    return subprocess.run(line, env=variables, input=answer, capture_output=True, text=True, timeout=120)


def errors(ended: Ended) -> list[str]:
    """What it says on stderr, which must be errors and nothing else."""
    lines = ended.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), ended.stderr
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture(scope="module")
def operator(fake_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    install_crds(fake_cluster)
    fake_cluster.apply(PROFILE)
    process = OperatorProcess(fake_cluster, tmp_path_factory.mktemp("operator") / "log").start()
    yield process
    process.stop()


class Place:
    """A namespace, a file, and the command for both."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.file = folder / "run.yaml"
        self.run = ClusterRun(cluster, namespace, "run")

    def write(self, text: str | None = None, **spec: Any) -> None:
        """The file: a run with parts of its spec changed, without a namespace."""
        document = run_document(self.namespace, "run", **spec)
        del document["metadata"]["namespace"]
        self.file.write_text(text if text is not None else yaml.safe_dump(document))

    def atelier(self, *arguments: str, answer: str = "") -> Ended:
        return atelier(self.cluster, *arguments, "-n", self.namespace, answer=answer)

    def submit(self, **spec: Any) -> None:
        self.write(**spec)
        ended = self.atelier("submit", str(self.file))
        assert ended.returncode == 0, ended.stderr

    def pods(self) -> list[Object]:
        return list(until(lambda: pods if len(pods := self.run.pods()) == 2 else None, "two pods"))

    def end(self, code: ExitCode, message: str = "") -> None:
        """Node 0 ends with the code, its peer as one that has lost it."""
        first, second = self.pods()
        self.run.end_pod(first, int(code), result(code, message))
        lost = ExitCode.DONE if code is ExitCode.DONE else ExitCode.COLLECTIVE_TIMEOUT
        self.run.end_pod(second, int(lost), result(lost))


def result(code: ExitCode, message: str = "") -> str:
    """What an agent leaves as its termination message."""
    reason = MEANINGS[code].reason
    facts = {"exitCode": int(code), "reason": reason, "message": message or reason, "attempt": "1.0", "step": 3}
    return json.dumps(facts | {"time": 1e9 if code is not ExitCode.COLLECTIVE_TIMEOUT else 2e9})


@pytest.fixture
def place(operator: OperatorProcess, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    namespace = f"c{abs(hash(request.node.nodeid)) % 10**8}"
    operator.cluster.make_namespace(namespace)
    yield Place(operator.cluster, namespace, tmp_path)
    operator.cluster.kubectl("delete", "namespace", namespace, "--wait=false")


# --- submit -----------------------------------------------------------------------------------------------------------


def test_a_run_is_submitted_as_its_file_says(place: Place) -> None:
    place.write(hyperparameters={"learningRate": 1e-5, "gradientClip": None, "microBatchSize": None})
    ended = place.atelier("submit", str(place.file))
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
    place.pods()
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


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_api_server_takes_the_examples(place: Place, file: Path) -> None:
    ended = place.atelier("submit", str(file), "--set", "profileRef.name=none")
    assert ended.stderr == ""
    assert ended.returncode == 0
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


# --- status, logs -----------------------------------------------------------------------------------------------------


def test_status_of_a_namespace_of_a_run_and_of_all(place: Place) -> None:
    assert place.atelier("status").stdout == f"no runs in namespace {place.namespace}\n"
    place.submit()
    place.pods()
    place.run.wait("Preparing", "Starting")
    heading, line = place.atelier("status").stdout.splitlines()
    assert heading.split() == ["name", "phase", "step", "loss", "left", "queue", "restarts"]
    assert line.split() == ["run", "Preparing", "0"]
    everywhere = atelier(place.cluster, "status", "-A").stdout.splitlines()
    assert [place.namespace, "run", "Preparing", "0"] in [each.split() for each in everywhere]
    one = place.atelier("status", "run").stdout
    for text in ("phase", "Preparing: ", "ddp, 2 processes, as jobset", "Accepted", "Valid", "s3://bucket/runs/"):
        assert text in one


def test_a_run_that_is_not_there(place: Place) -> None:
    for arguments in (["status", "none"], ["logs", "none"], ["stop", "none"], ["resume", "none"], ["delete", "none"]):
        ended = place.atelier(*arguments)
        assert ended.returncode == 64
        assert errors(ended) == [
            f"there is no run none in namespace {place.namespace}; `atelier status -A` lists those of all namespaces"
        ]


def test_a_log_that_the_node_does_not_give_is_one_sentence(place: Place) -> None:
    place.submit()
    pod = place.pods()[1]
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
    place.pods()
    place.atelier("stop", "run")
    place.run.wait("Suspended", "Requested")
    (said,) = errors(place.atelier("logs", "run"))
    assert "; what earlier ones have logged is in s3://bucket/runs/" in said


# --- stop, resume, delete ---------------------------------------------------------------------------------------------


def test_stop_and_resume(place: Place) -> None:
    place.submit()
    place.pods()
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
    place.pods()
    assert place.run.status()["attempt"] == 2
    place.end(ExitCode.DONE)
    place.run.wait("Succeeded")
    ended = place.atelier("stop", "run")
    assert (ended.returncode, errors(ended)) == (64, ["run run has succeeded; there is nothing to stop"])


def test_delete_asks(place: Place) -> None:
    place.submit()
    place.pods()
    ended = place.atelier("delete", "run", answer="n\n")
    assert ended.returncode == 1
    assert f"run run in namespace {place.namespace} is Preparing; delete it?" in ended.stdout
    assert place.run.get()
    ended = place.atelier("delete", "run", "-y")
    assert ended.stdout.startswith("run run is deleted; what it made stays in s3://bucket/runs/")
    until(lambda: place.run.objects() == [], "everything to go")


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
    place.pods()
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
    environment = place.cluster.environment | {"KUBECONFIG": str(kubeconfig)}
    ended = run_with(environment, "install-check", "-n", place.namespace)
    assert ended.returncode == 1
    found = findings(ended)
    assert (found["operator"], found["profiles"], found["rights"]) == ("unknown", "unknown", "missing")
    assert "you may not delete trainingruns" in ended.stdout
    refused = run_with(environment, "status", "-A")
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
        until(lambda: findings(atelier(cluster, "install-check"))["operator"] == "ok", "the operator's Lease")
        assert findings(atelier(cluster, "install-check"))["GPUs"] == "missing"
        operator.stop()
        assert "it has let go of its Lease: it was stopped" in atelier(cluster, "install-check").stdout

        cluster.stop("apiserver")
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
