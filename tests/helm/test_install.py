"""The chart in a real API server: installed, upgraded, uninstalled, and the operator with no more rights than the chart gives it.

One release goes through the tests in their order, since kinds that come and go keep an API server busy.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import chart_release
from atelier_api.crdgen import resources
from chart_release import ACCOUNT, IMAGE, SYSTEM, USER, chart_operator
from cluster.daemons import ClusterError
from cluster.local import Cluster
from cluster_documents import PROFILE, run_document
from operator_process import ClusterRun, until, wait_for_crd

pytest_plugins = ("cluster_fixtures",)
pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]

CHART = str(chart_release.CHART)
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
    values.write_text(json.dumps({"operator": IMAGE, "quotas": quotas, "crds": {"install": False}}))
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
    queues = cluster.api.items("clusterqueues") + cluster.api.items("localqueues")
    conditions = (each for queue in queues for each in (queue.get("status") or {}).get("conditions", ()))
    return [each["status"] for each in conditions if each["type"] == "Active"]


@pytest.fixture(scope="module")
def helm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Calls helm for the release `atelier`."""
    path = tmp_path_factory.mktemp("helm") / "values.json"

    def call(verb: str, *arguments: str, chart: str | Path = CHART, values: Values | None = None) -> str:
        given = [str(chart), "-f", str(path)] if values is not None else []
        path.write_text(json.dumps({"operator": IMAGE, "webhook": BRIEF} | dict(values or {})))
        return cluster.helm(verb, "atelier", *given, f"--namespace={SYSTEM}", *arguments)

    return call


@pytest.fixture(scope="module")
def release(cluster: Cluster, helm: Helm) -> Helm:
    """The release, which was the first to bring the CRDs: a rollback to its revision 1 brings that state back."""
    helm("install", "--dry-run=server", "--create-namespace", values=profiles("one"))
    assert crds(cluster) == []
    helm("install", "--create-namespace", values=profiles("one"))
    return helm


def test_the_operator_needs_no_right_that_the_chart_does_not_give(
    cluster: Cluster, release: Helm, tmp_path: Path
) -> None:
    """Before kinds have gone and come again: the garbage collector takes a minute to know them then."""
    namespace = cluster.make_namespace("rights-cluster")
    assert_no_right_is_missing(cluster, namespace, "ClusterTrainingProfile", tmp_path / "log")


def assert_no_right_is_missing(cluster: Cluster, namespace: str, profile: str, log: Path) -> None:
    """In a life of two runs with a default profile of this kind."""
    known = cluster.audited()
    operator = chart_operator(cluster, log).start()
    try:
        live_a_life(cluster, namespace, {"kind": profile, "name": "default"})
    finally:
        operator.stop()
    asked = [each for each in cluster.audit(known) if each["user"]["username"] == USER]
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
    return {each["metadata"]["name"] for each in cluster.api.items("trainingruns", namespace)}


def install_crds(cluster: Cluster) -> None:
    """As an administrator does for a namespaced release: the command of docs/how-to/install-on-a-cluster.md."""
    for path in sorted((Path(CHART).parents[1] / "crds").glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", str(path))
        wait_for_crd(cluster, path.stem)


def crds(cluster: Cluster) -> list[str]:
    place = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    return [name for each in resources() if cluster.api.get(f"{place}/{(name := f'{each.plural}.atelier.dev')}")]


def image_of_default(cluster: Cluster) -> str:
    return str(cluster.get("clustertrainingprofile", "default")["spec"]["image"])


def profiles(image: str) -> Values:
    return {"profiles": {"cluster": {"default": PROFILE["spec"] | {"image": image}}}}


def test_pods_are_admitted_where_pod_security_is_restricted(cluster: Cluster, release: Helm) -> None:
    cluster.kubectl("label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
    deployment = cluster.get("deployment", ACCOUNT, f"--namespace={SYSTEM}")
    hooks = yaml.safe_load_all(cluster.helm("get", "hooks", "atelier", f"--namespace={SYSTEM}"))
    specs = [deployment["spec"]["template"]["spec"], *(each["spec"] for each in hooks if each["kind"] == "Pod")]
    assert len(specs) == 2
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": SYSTEM}, "spec": spec}
        cluster.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(pod))


def test_a_second_release_over_the_same_namespaces_is_refused(cluster: Cluster, release: Helm) -> None:
    image = "operator.image.repository=x"
    with pytest.raises(ClusterError, match=r"ClusterRole.*cannot be imported into the current release"):
        cluster.helm("install", "other", CHART, f"--set={image},crds.install=false", "--namespace=default")


def test_first_installation_brings_crds_and_profiles_and_upgrades_change_them(cluster: Cluster, release: Helm) -> None:
    assert len(crds(cluster)) == 3
    assert image_of_default(cluster) == "one"
    release("upgrade", values=profiles("two") | {"operator": IMAGE | {"replicas": 3}})
    assert image_of_default(cluster) == "two"
    assert cluster.get("deployment", ACCOUNT, f"--namespace={SYSTEM}")["spec"]["replicas"] == 3


def test_a_rollback_brings_the_profiles_of_the_first_installation_back(cluster: Cluster, release: Helm) -> None:
    release("rollback", "1")
    assert image_of_default(cluster) == "one"
    release("upgrade", values=profiles("three"))
    assert image_of_default(cluster) == "three"
    release("upgrade", values={})
    assert cluster.get("clustertrainingprofiles")["items"] == []


def test_a_profile_of_the_first_installation_can_be_removed(cluster: Cluster, release: Helm) -> None:
    release("rollback", "1")
    assert image_of_default(cluster) == "one"
    release("upgrade", values={})
    assert cluster.get("clustertrainingprofiles")["items"] == []


def test_runs_outlive_the_release_and_the_next_one_takes_the_crds_over(cluster: Cluster, release: Helm) -> None:
    release("rollback", "1")
    cluster.apply(run_document("default", "survivor"))
    release("uninstall")
    assert cluster.get("clustertrainingprofiles")["items"] == []
    assert cluster.get("trainingrun", "survivor", "--namespace=default")["metadata"]["name"] == "survivor"
    release("install", values=profiles("two"))
    assert image_of_default(cluster) == "two"


def test_the_webhooks_certificate_is_kept_by_upgrades_and_made_anew_in_time(cluster: Cluster, release: Helm) -> None:
    first = certificate(cluster)
    release("upgrade", values={"operator": IMAGE | {"replicas": 3}})
    assert certificate(cluster) == first
    secret = ("secret", f"{ACCOUNT}-webhook", f"--namespace={SYSTEM}")
    cluster.kubectl("annotate", *secret, "--overwrite", "atelier.dev/renew-after=1700000000")
    release("upgrade", values={})
    second = certificate(cluster)
    cluster.kubectl("delete", *secret)
    release("upgrade", values={})
    assert len({first, second, certificate(cluster)}) == 3


def certificate(cluster: Cluster) -> str:
    """What the operator's pods would serve, whose authority the API server trusts."""
    data = cluster.get("secret", f"{ACCOUNT}-webhook", f"--namespace={SYSTEM}")["data"]
    (webhook,) = cluster.get("validatingwebhookconfiguration", ACCOUNT)["webhooks"]
    assert webhook["clientConfig"]["caBundle"] == data["ca.crt"]
    return str(data["tls.crt"])


def test_a_namespaced_operator_needs_no_right_on_the_cluster(cluster: Cluster, release: Helm, tmp_path: Path) -> None:
    release("uninstall")
    namespace = cluster.make_namespace("rights-namespaced")
    install_crds(cluster)
    values = {
        "crds": {"install": False},
        "rbac": {"scope": "namespaced", "namespaces": [namespace]},
        "profiles": {"namespaced": {namespace: {"default": PROFILE["spec"]}}},
    }
    release("install", values=values)
    assert_no_right_is_missing(cluster, namespace, "TrainingProfile", tmp_path / "log")
    release("uninstall")


def test_runs_go_with_the_release_where_it_is_told_so(cluster: Cluster, release: Helm) -> None:
    release("install", values=profiles("one") | {"crds": {"keep": False}})
    release("uninstall")
    # The API server looks for a minute whether all objects of a kind are gone, and where it has seen one begins again.
    until(lambda: crds(cluster) == [], "the CRDs to be gone", seconds=240)


def test_a_newer_chart_brings_new_fields_of_the_crds(cluster: Cluster, helm: Helm, tmp_path: Path) -> None:
    """By an installation after the older one is gone, and by an upgrade. The last test: it begins without CRDs."""
    older = Path(shutil.copytree(CHART, tmp_path / "atelier"))
    crd = older / "templates" / "crds" / "trainingprofiles.atelier.dev.yaml"
    text = crd.read_text()
    crd.write_text(re.sub(r"\n +python:\n(.+\n)+? +minLength: 1\n +maxLength: 1024\n", "\n", text, count=1))
    assert crd.read_text() != text
    helm("install", "--create-namespace", chart=older, values={})
    assert not has_python(cluster)
    helm("uninstall")
    helm("install", values={})
    assert has_python(cluster)
    helm("upgrade", chart=older, values={})
    assert not has_python(cluster)
    helm("upgrade", values={})
    assert has_python(cluster)


def has_python(cluster: Cluster) -> bool:
    """Whether the served CRD has the field that the older chart lacks."""
    (version,) = cluster.get("crd", "trainingprofiles.atelier.dev")["spec"]["versions"]
    return "python" in version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
