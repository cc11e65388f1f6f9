"""The chart in a real API server: installed, upgraded, uninstalled, and the operator with no more rights than the chart gives it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import chart_release
from chart_release import ACCOUNT, IMAGE, SYSTEM, USER, chart_operator
from cluster.daemons import ClusterError
from cluster.local import Cluster
from cluster_documents import PROFILE, run_document
from operator_process import ClusterRun, until, wait_for_crd

pytest_plugins = ("cluster_fixtures",)
pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]

CHART = str(chart_release.CHART)
WITHOUT_CRDS = {"crds": {"install": False}}  # for tests of other parts: kinds that come and go keep an API server busy
BRIEF = {"timeoutSeconds": 1}  # nobody answers at the Service's address: this cluster has no pods

Values = Mapping[str, Any]
Helm = Callable[..., str]


@pytest.fixture(scope="module")
def cluster_to_fill(start_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    """Without Kueue, until a test needs it."""
    with start_cluster(kueue=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster(cluster_to_fill: Cluster) -> Cluster:
    if "kueue" not in cluster_to_fill.processes():
        cluster_to_fill.add_kueue()
    return cluster_to_fill


def test_quotas_need_kueue_and_become_queues_that_are_active(cluster_to_fill: Cluster, tmp_path: Path) -> None:
    """The first test of the file: of all others the cluster has Kueue."""
    cluster = cluster_to_fill
    teams = [{"name": name, "namespaces": [name], "gpus": [{"flavor": "h100", "quota": 4}]} for name in ("art", "film")]
    quotas = {"engine": "kueue", "flavors": [{"name": "h100", "nodeLabels": {"gpu": "h"}}], "teams": teams}
    values = tmp_path / "values.json"
    values.write_text(json.dumps({"operator": IMAGE, "quotas": quotas} | WITHOUT_CRDS))
    install = ("install", "atelier", CHART, "-f", str(values), f"--namespace={SYSTEM}", "--create-namespace")
    for team in teams:
        cluster.make_namespace(str(team["name"]))
    with pytest.raises(ClusterError, match=r"does not serve kueue\.x-k8s\.io"):
        cluster.helm(*install)
    cluster.add_kueue()
    cluster.helm(*install)
    until(lambda: activity(cluster) == ["True"] * 4, "the queues to be active")
    cluster.helm("uninstall", "atelier", f"--namespace={SYSTEM}", "--wait")
    assert activity(cluster) == []


def activity(cluster: Cluster) -> list[str]:
    """Status of the condition Active of every queue."""
    queues = cluster.get("clusterqueues")["items"] + cluster.get("localqueues", "--all-namespaces")["items"]
    conditions = (each for queue in queues for each in (queue.get("status") or {}).get("conditions", ()))
    return [each["status"] for each in conditions if each["type"] == "Active"]


@pytest.fixture
def helm(cluster: Cluster, tmp_path: Path) -> Iterator[Helm]:
    """Calls helm; what it has installed is gone after the test, and so are the CRDs."""

    def call(verb: str, *arguments: str, values: Values | None = None) -> str:
        given = [CHART, "-f", str(tmp_path / "values.json")] if values is not None else []
        (tmp_path / "values.json").write_text(json.dumps({"operator": IMAGE, "webhook": BRIEF} | dict(values or {})))
        return cluster.helm(verb, "atelier", *given, f"--namespace={SYSTEM}", *arguments)

    yield call
    call("uninstall", "--ignore-not-found")
    for name in crds(cluster):
        cluster.kubectl("delete", "crd", name)


# First of those that install the CRDs: where kinds have come and gone before, the garbage collector takes a minute to know them again.


@pytest.mark.parametrize("scope", ["cluster", "namespaced"])
def test_the_operator_needs_no_right_that_the_chart_does_not_give(
    cluster: Cluster, helm: Helm, tmp_path: Path, scope: str
) -> None:
    namespace = cluster.make_namespace(f"rights-{scope}")
    values: dict[str, Any] = {"profiles": {"cluster": {"default": PROFILE["spec"]}}}
    reference = {"kind": "ClusterTrainingProfile", "name": "default"}
    if scope == "namespaced":
        install_crds(cluster)
        values = {
            "crds": {"install": False},
            "rbac": {"scope": "namespaced", "namespaces": [namespace]},
            "profiles": {"namespaced": {namespace: {"default": PROFILE["spec"]}}},
        }
        reference["kind"] = "TrainingProfile"
    helm("install", "--create-namespace", values=values)
    operator = chart_operator(cluster, tmp_path / "log").start()
    try:
        live_a_life(cluster, namespace, reference)
    finally:
        operator.stop()
    asked = [each for each in cluster.audit() if each["user"]["username"] == USER]
    refused = {(each["verb"], each["requestURI"]) for each in asked if each["responseStatus"]["code"] == 403}
    assert asked
    assert refused == set(), operator.text()[-3000:]
    assert not {each["objectRef"]["resource"] for each in asked if "objectRef" in each} & {"secrets", "nodes"}


def live_a_life(cluster: Cluster, namespace: str, reference: Values) -> None:
    """A run is started, suspended and started again; another one ends by its deadline, and is deleted after its end."""
    schedule = {"startTimeoutSeconds": 2, "ttlSecondsAfterFinished": 1}
    cluster.apply(run_document(namespace, "run", profileRef=reference))
    run = ClusterRun(cluster, namespace, "run")
    until(lambda: run.objects("jobsets"), "the JobSet")
    run.patch({"schedule": {"suspend": True}})
    until(lambda: not run.objects("jobsets"), "the JobSet to be stopped")
    run.patch({"schedule": {"suspend": False}})
    until(lambda: run.objects("jobsets"), "another JobSet")
    cluster.apply(run_document(namespace, "late", profileRef=reference, schedule=schedule))
    until(lambda: "late" not in names(cluster, namespace), "the run with a deadline to be deleted")
    assert cluster.get("events", f"--namespace={namespace}")["items"]


def names(cluster: Cluster, namespace: str) -> set[str]:
    return {each["metadata"]["name"] for each in cluster.get("trainingruns", f"--namespace={namespace}")["items"]}


def install_crds(cluster: Cluster) -> None:
    """As an administrator does for a namespaced release: the command of docs/how-to/install-on-a-cluster.md."""
    for path in sorted((Path(CHART).parents[1] / "crds").glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", str(path))
        wait_for_crd(cluster, path.stem)


def crds(cluster: Cluster) -> list[str]:
    names = (each["metadata"]["name"] for each in cluster.get("crd")["items"])
    return [name for name in names if name.endswith(".atelier.dev")]


def image_of_default(cluster: Cluster) -> str:
    return str(cluster.get("clustertrainingprofile", "default")["spec"]["image"])


def profiles(image: str) -> Values:
    return {"profiles": {"cluster": {"default": {"image": image}}}}


def test_first_installation_brings_crds_and_profiles_and_upgrades_change_them(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--dry-run=server", "--create-namespace", values=profiles("one"))
    assert crds(cluster) == []
    helm("install", "--create-namespace", values=profiles("one"))
    assert len(crds(cluster)) == 3
    assert image_of_default(cluster) == "one"
    helm("upgrade", values=profiles("two") | {"operator": IMAGE | {"replicas": 3}})
    assert image_of_default(cluster) == "two"
    assert cluster.get("deployment", ACCOUNT, f"--namespace={SYSTEM}")["spec"]["replicas"] == 3
    helm("upgrade", values={})
    assert cluster.get("clustertrainingprofiles")["items"] == []


def test_pods_are_admitted_where_pod_security_is_restricted(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=WITHOUT_CRDS)
    cluster.kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
    deployment = cluster.get("deployment", ACCOUNT, f"--namespace={SYSTEM}")
    hooks = yaml.safe_load_all(cluster.helm("get", "hooks", "atelier", f"--namespace={SYSTEM}"))
    specs = [deployment["spec"]["template"]["spec"], *(each["spec"] for each in hooks if each["kind"] == "Pod")]
    assert len(specs) == 2
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": SYSTEM}, "spec": spec}
        cluster.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(pod))


def test_a_profile_of_the_first_installation_can_be_removed(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=profiles("one"))
    helm("upgrade", values={})
    assert cluster.get("clustertrainingprofiles")["items"] == []


def test_a_rollback_brings_the_profiles_of_the_first_installation_back(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=profiles("one"))
    helm("upgrade", values=profiles("two"))
    cluster.helm("rollback", "atelier", "1", f"--namespace={SYSTEM}")
    assert image_of_default(cluster) == "one"
    helm("upgrade", values=profiles("three"))
    assert image_of_default(cluster) == "three"


def test_runs_outlive_the_release_and_the_next_one_takes_the_crds_over(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=profiles("one"))
    cluster.apply(run_document("default", "survivor"))
    helm("uninstall")
    assert cluster.get("clustertrainingprofiles")["items"] == []
    assert cluster.get("trainingrun", "survivor", "--namespace=default")["metadata"]["name"] == "survivor"
    helm("install", values=profiles("two"))
    assert image_of_default(cluster) == "two"


def test_runs_go_with_the_release_where_it_is_told_so(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=profiles("one") | {"crds": {"keep": False}})
    helm("uninstall")
    # The API server looks for a minute whether all objects of a kind are gone, and where it has seen one begins again.
    until(lambda: crds(cluster) == [], "the CRDs to be gone", seconds=240)


def test_the_webhooks_certificate_is_kept_by_upgrades_and_made_anew_in_time(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=WITHOUT_CRDS)
    first = certificate(cluster)
    helm("upgrade", values=WITHOUT_CRDS | {"operator": IMAGE | {"replicas": 3}})
    assert certificate(cluster) == first
    secret = ("secret", f"{ACCOUNT}-webhook", f"--namespace={SYSTEM}")
    cluster.kubectl("annotate", *secret, "--overwrite", "atelier.dev/renew-after=1700000000")
    helm("upgrade", values=WITHOUT_CRDS)
    second = certificate(cluster)
    cluster.kubectl("delete", *secret)
    helm("upgrade", values=WITHOUT_CRDS)
    assert len({first, second, certificate(cluster)}) == 3


def certificate(cluster: Cluster) -> str:
    """What the operator's pods would serve, whose authority the API server trusts."""
    data = cluster.get("secret", f"{ACCOUNT}-webhook", f"--namespace={SYSTEM}")["data"]
    (webhook,) = cluster.get("validatingwebhookconfiguration", ACCOUNT)["webhooks"]
    assert webhook["clientConfig"]["caBundle"] == data["ca.crt"]
    return str(data["tls.crt"])


def test_a_second_release_over_the_same_namespaces_is_refused(cluster: Cluster, helm: Helm) -> None:
    helm("install", "--create-namespace", values=WITHOUT_CRDS)
    image = "operator.image.repository=x"
    with pytest.raises(ClusterError, match=r"ClusterRole.*cannot be imported into the current release"):
        cluster.helm("install", "other", CHART, f"--set={image},crds.install=false", "--namespace=default")


@pytest.mark.parametrize("again", ["upgrade", "install"])
def test_a_newer_chart_brings_new_fields_of_the_crds(cluster: Cluster, helm: Helm, tmp_path: Path, again: str) -> None:
    older = Path(shutil.copytree(CHART, tmp_path / "atelier"))
    crd = older / "templates" / "crds" / "trainingprofiles.atelier.dev.yaml"
    text = crd.read_text()
    crd.write_text(re.sub(r"\n +python:\n(.+\n)+? +minLength: 1\n +maxLength: 1024\n", "\n", text, count=1))
    assert crd.read_text() != text
    values = tmp_path / "older.json"
    values.write_text(json.dumps({"operator": IMAGE}))
    cluster.helm("install", "atelier", str(older), "-f", str(values), f"--namespace={SYSTEM}", "--create-namespace")
    assert not has_python(cluster)
    if again == "install":
        helm("uninstall")
    helm(again, values={})
    assert has_python(cluster)


def has_python(cluster: Cluster) -> bool:
    """Whether the served CRD has the field that the older chart lacks."""
    (version,) = cluster.get("crd", "trainingprofiles.atelier.dev")["spec"]["versions"]
    return "python" in version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
