"""The webhook as a user of kubectl meets it: a real API server calls it, as the chart has it registered."""

import json
import signal
import ssl
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import programs
from cluster.local import Cluster
from cluster_documents import PROFILE, run_document
from operator_process import ClusterRun, OperatorProcess, forget_namespace, free_port, install_crds, until
from reviews import review
from runs import merged
from tls import served_certificate
from webhooks import BesideWebhook

pytest_plugins = ("cluster_fixtures",)
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]

Object = dict[str, Any]
Ended = subprocess.CompletedProcess[str]

TOO_LARGE: Object = {"model": {"family": "flux"}, "adapter": {"type": "full"}, "hyperparameters": {"steps": 10}}
SMALL_PROFILE = merged(PROFILE, {"metadata": {"name": "small"}, "spec": {"limits": {"nodes": 1}}})


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    with start_cluster(jobset=False, kueue=False) as cluster:
        install_crds(cluster)
        cluster.apply([PROFILE, SMALL_PROFILE])
        yield cluster


@pytest.fixture(scope="module")
def webhook(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> BesideWebhook:
    return BesideWebhook(cluster, tmp_path_factory.mktemp("webhook") / "secret")


@pytest.fixture(scope="module")
def operator(
    cluster: Cluster, webhook: BesideWebhook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    process = OperatorProcess(cluster, tmp_path_factory.mktemp("operator") / "log", settings=webhook.settings).start()
    yield process
    process.stop()


@pytest.fixture
def namespace(operator: OperatorProcess, webhook: BesideWebhook, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the webhook works: the API server knows it, and the operator has read the profiles."""
    name = operator.cluster.make_namespace(f"a{abs(hash(request.node.nodeid)) % 10**8}")
    webhook.register()
    until(lambda: refuses(operator.cluster, name), "the webhook to be called")
    yield name
    forget_namespace(operator.cluster, name)


def kubectl(cluster: Cluster, *arguments: str, documents: Object | list[Object] | None = None) -> Ended:
    """What a user sees, whether it works or not."""
    given = documents if isinstance(documents, list) else [documents]
    text = yaml.safe_dump_all(given) if documents else None
    line = [str(programs.program("kubectl")), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    return subprocess.run(line, input=text, capture_output=True, text=True, timeout=60, check=False)


def apply(cluster: Cluster, *documents: Object) -> Ended:
    return kubectl(cluster, "apply", "-f", "-", documents=list(documents))


def refuses(cluster: Cluster, namespace: str) -> bool:
    document = run_document(namespace, "probe", **TOO_LARGE)
    return kubectl(cluster, "create", "--dry-run=server", "-f", "-", documents=document).returncode != 0


def test_kubectl_tells_what_would_fit(cluster: Cluster, namespace: str) -> None:
    ended = apply(cluster, run_document(namespace, "large", **TOO_LARGE))
    assert ended.returncode != 0
    assert 'admission webhook "trainingruns.atelier.dev" denied the request' in ended.stderr
    assert "does not fit: needs " in ended.stderr
    assert "would fit: spec." in ended.stderr
    forbidden = apply(cluster, run_document(namespace, "wide", profileRef={"name": "small"}))
    assert "Error from server (Forbidden)" in forbidden.stderr
    assert "spec.parallelism.nodes is 2; the profile allows at most 1" in forbidden.stderr
    assert cluster.get("trainingruns", f"--namespace={namespace}")["items"] == []


def test_a_sound_run_is_let_in_and_a_change_that_breaks_it_is_not(cluster: Cluster, namespace: str) -> None:
    ended = apply(cluster, run_document(namespace, "run"))
    assert (ended.returncode, ended.stderr) == (0, "")
    patch = '{"spec": {"model": {"family": "flux"}, "adapter": {"type": "full"}}}'
    changed = kubectl(cluster, "patch", "trun", "run", f"-n{namespace}", "--type=merge", f"-p{patch}")
    assert changed.returncode != 0


def test_a_profile_may_come_with_its_first_run(cluster: Cluster, namespace: str) -> None:
    reference = {"kind": "TrainingProfile", "name": "ours"}
    ours = {"kind": "TrainingProfile", "metadata": {"name": "ours", "namespace": namespace}}
    ended = apply(cluster, run_document(namespace, "early", profileRef=reference), {**PROFILE, **ours})
    assert ended.returncode == 0
    assert "Warning: stored, but it cannot start: spec.profileRef names TrainingProfile ours" in ended.stderr
    run = ClusterRun(cluster, namespace, "early")
    until(lambda: run.status().get("attempt") == 1, "the run to start once its profile is there")


def test_where_it_does_not_answer_the_run_is_stored_and_its_status_says_the_same(
    cluster: Cluster, operator: OperatorProcess, webhook: BesideWebhook, namespace: str
) -> None:
    """Away, then back: what came in meanwhile is judged, can be labelled, stopped and deleted."""
    operator.stop()
    ended = apply(cluster, run_document(namespace, "large", **TOO_LARGE))
    assert ended.returncode == 0, ended.stderr
    operator.start()
    run = ClusterRun(cluster, namespace, "large")
    status = run.wait("Pending", "DoesNotFit")
    until(lambda: refuses(cluster, namespace), "the webhook to be called")
    refusal = apply(cluster, run_document(namespace, "large-too", **TOO_LARGE)).stderr
    assert status["message"] in refusal
    cluster.kubectl("label", "trun", "large", f"-n{namespace}", "a=b")
    cluster.kubectl("patch", "trun", "large", f"-n{namespace}", "--type=merge", '-p{"metadata":{"finalizers":["a/b"]}}')
    stopped = kubectl(
        cluster, "patch", "trun", "large", f"-n{namespace}", "--type=merge", '-p{"spec":{"schedule":{"suspend":true}}}'
    )
    assert stopped.returncode == 0
    assert "Warning: stored, but as before it cannot start" in stopped.stderr
    run.delete()
    cluster.kubectl("patch", "trun", "large", f"-n{namespace}", "--type=merge", '-p{"metadata":{"finalizers":null}}')
    until(lambda: not cluster.get("trainingruns", f"--namespace={namespace}")["items"], "the run to be gone")


def test_a_webhook_that_hangs_or_is_nobody_we_trust_lets_runs_in(
    cluster: Cluster, operator: OperatorProcess, webhook: BesideWebhook, namespace: str
) -> None:
    webhook.register(timeout_seconds=1)
    assert operator.process is not None
    operator.process.send_signal(signal.SIGSTOP)
    try:
        ended = apply(cluster, run_document(namespace, "slow", **TOO_LARGE))
    finally:
        operator.process.send_signal(signal.SIGCONT)
    assert ended.returncode == 0, ended.stderr
    until(lambda: refuses(cluster, namespace), "the webhook to be called")
    webhook.register(trusted=webhook.new_pair())
    until(lambda: not refuses(cluster, namespace), "the foreign certificate to be refused")
    assert apply(cluster, run_document(namespace, "foreign", **TOO_LARGE)).returncode == 0


def test_a_replica_that_waits_is_ready_and_answers_as_well(
    cluster: Cluster, operator: OperatorProcess, namespace: str, tmp_path: Path
) -> None:
    beside, metrics = BesideWebhook(cluster, tmp_path / "secret"), free_port()
    settings = {**beside.settings, "ATELIER_METRICS_PORT": str(metrics)}
    second = OperatorProcess(cluster, tmp_path / "log", settings=settings).start()
    try:
        until(lambda: fetched(f"http://127.0.0.1:{metrics}/readyz") == "ok\n", "the second replica to be ready")
        assert "atelier_operator_leader 0.0" in fetched(f"http://127.0.0.1:{metrics}/metrics").splitlines()
        question = json.dumps(review(run_document(namespace, "large", **TOO_LARGE))).encode()
        trusted = ssl.create_default_context(cadata=beside.pair.certificate.decode())
        said = json.loads(fetched(f"https://127.0.0.1:{beside.port}/validate", question, trusted))
        assert "would fit: spec." in said["response"]["status"]["message"]
    finally:
        second.stop()


def fetched(url: str, body: bytes | None = None, trusted: ssl.SSLContext | None = None) -> str:
    """What a server of loopback answers; nothing while it answers no."""
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)]
    try:
        with urllib.request.build_opener(*handlers).open(url, body, timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_a_new_certificate_is_served_and_trusted_without_a_restart(
    cluster: Cluster, operator: OperatorProcess, webhook: BesideWebhook, namespace: str
) -> None:
    assert operator.process is not None
    pid = operator.process.pid
    assert served_certificate(webhook.port) == webhook.pair.der
    webhook.pair = webhook.new_pair()
    webhook.pair.write(Path(webhook.settings["ATELIER_WEBHOOK_CERTIFICATES"]))
    until(lambda: served_certificate(webhook.port) == webhook.pair.der, "the new certificate")
    webhook.register()
    until(lambda: refuses(cluster, namespace), "the new certificate to be trusted")
    assert operator.process.pid == pid
    assert operator.process.poll() is None
