"""What the chart makes of its values, besides rights and quotas."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]  # the first test on a machine builds helm
pytest_plugins = ("cluster_fixtures",)

Helm = Any  # the fixture of conftest.py
Object = dict[str, Any]
Values = Mapping[str, Any]

ROOT = Path(__file__).resolve().parents[2]
TEAMS = {
    "engine": "resourceQuota",
    "flavors": [{"name": "h100"}],
    "teams": [{"name": "art", "namespaces": ["art"], "gpus": [{"flavor": "h100", "quota": 8}]}],
}
NAMESPACED = {"rbac": {"scope": "namespaced"}, "crds": {"install": False}}
POD_MONITOR, SERVICE_MONITOR = "monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/ServiceMonitor"


def pod_specs(rendered: Any) -> Iterator[Object]:
    yield from (each["spec"]["template"]["spec"] for each in rendered.of("Deployment"))
    yield from (each["spec"] for each in rendered.of("Pod"))


@pytest.mark.parametrize("values", [{}, NAMESPACED, {"quotas": TEAMS}])
def test_lint_has_nothing_to_say(helm: Helm, values: Values) -> None:
    assert helm.lint(values) == ""


def test_crds_are_those_of_the_api_and_stay_by_default(helm: Helm) -> None:
    rendered = {each["metadata"]["name"]: each for each in helm.template({}).of("CustomResourceDefinition")}
    sources = [yaml.safe_load(path.read_text()) for path in (ROOT / "crds").glob("*.yaml")]
    assert len(rendered) == len(sources) == 3
    for source in sources:
        crd = rendered[source["metadata"]["name"]]
        assert crd["spec"] == source["spec"]
        assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_crds_can_be_left_out_and_can_go_with_the_release(helm: Helm) -> None:
    assert helm.template({"crds": {"install": False}}).of("CustomResourceDefinition") == []
    for crd in helm.template({"crds": {"keep": False}}).of("CustomResourceDefinition"):
        assert "annotations" not in crd["metadata"]


def test_the_operator_reads_every_variable_that_it_is_given(helm: Helm) -> None:
    from atelier_operator.settings import Settings

    values = {"operator": {"metricsPort": 9090, "resyncSeconds": 1, "progressSeconds": 2.5, "leaseSeconds": 9}}
    given = helm.template({"webhook": {"port": 8443}}, values).environment()
    assert (given["ATELIER_WEBHOOK_PORT"], given["ATELIER_WEBHOOK_CERTIFICATES"]) == ("8443", "/etc/atelier/webhook")
    given = given | helm.template(NAMESPACED, values).environment()
    assert Settings.of(given) == Settings(
        namespaces=("atelier-system",),
        lease_namespace="metadata.namespace",
        lease_name="atelier-operator",
        identity="metadata.name",
        metrics_port=9090,
        webhook_port=8443,
        resync_seconds=1.0,
        progress_seconds=2.5,
        lease_seconds=9.0,
    )
    read: set[str] = set()

    class Recorded(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    Settings.of(Recorded(given))
    assert set(given) <= read


def test_pods_pass_restricted_pod_security(helm: Helm) -> None:
    specs = list(pod_specs(helm.template({})))
    assert len(specs) == 2
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_probes_ask_the_event_loop(helm: Helm) -> None:
    (container,) = helm.template({}).one("Deployment")["spec"]["template"]["spec"]["containers"]
    asked = {each: container[each]["httpGet"] for each in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {each: get["path"] for each, get in asked.items()} == {
        "startupProbe": "/healthz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }
    assert {get["port"] for get in asked.values()} == {"metrics"}


def test_two_replicas_and_one_of_them_may_be_drained(helm: Helm) -> None:
    rendered = helm.template({})
    assert rendered.one("Deployment")["spec"]["replicas"] == 2
    assert rendered.one("PodDisruptionBudget")["spec"]["minAvailable"] == 1
    assert helm.template({"operator": {"replicas": 1}}).of("PodDisruptionBudget") == []


def test_a_digest_wins_over_a_tag(helm: Helm) -> None:
    image = {"tag": "1", "digest": "sha256:" + "a" * 64}
    (container,) = helm.template({"operator": {"image": image}}).one("Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["image"] == f"registry.example.org/atelier-operator@{image['digest']}"


def test_an_image_must_be_named(helm: Helm) -> None:
    assert "operator.image.repository is empty" in helm.refusal({"operator": {"image": {"repository": ""}}})


# --- network and monitoring ---------------------------------------------------------------------------------------------


def test_the_operator_reaches_the_api_server_dns_and_progress_alone(helm: Helm) -> None:
    policy = helm.template({"network": {"apiServer": {"cidrs": ["10.0.0.1/32"]}}}).one("NetworkPolicy")["spec"]
    ports = [[port["port"] for port in rule["ports"]] for rule in policy["egress"]]
    assert ports == [[443, 6443], [53, 53], [9400]]
    assert policy["egress"][0]["to"] == [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    assert helm.template({"network": {"enabled": False}}).of("NetworkPolicy") == []


def test_who_may_read_metrics_can_be_said_and_helm_test_always_may(helm: Helm) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    rendered = helm.template({"network": {"metricsFrom": [peer]}})
    rule, of_the_webhook = rendered.one("NetworkPolicy")["spec"]["ingress"]
    assert of_the_webhook == {"ports": [{"port": "webhook"}]}
    assert rule["from"][1:] == [peer]
    test_pod = rule["from"][0]["podSelector"]["matchLabels"]
    assert test_pod == rendered.one("Pod")["metadata"]["labels"]
    assert "from" not in helm.template({}).one("NetworkPolicy")["spec"]["ingress"][0]


def test_only_pods_of_runs_reach_training_pods(helm: Helm) -> None:
    rendered = helm.template({"network": {"runs": {"namespaces": ["art", "film"]}}})
    policies = [each for each in rendered.of("NetworkPolicy") if each["metadata"]["name"] == "atelier-runs"]
    assert [each["metadata"]["namespace"] for each in policies] == ["art", "film"]
    spec = policies[0]["spec"]
    assert spec["podSelector"] == {"matchExpressions": [{"key": "atelier.dev/run", "operator": "Exists"}]}
    assert (spec["policyTypes"], "egress" in spec) == (["Ingress"], False)
    gang, told = spec["ingress"]
    assert gang == {"from": [{"podSelector": spec["podSelector"]}]}
    assert told == {"ports": [{"port": 9400}]}


def test_what_training_pods_reach_can_be_said(helm: Helm) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    store = {"to": [{"ipBlock": {"cidr": "10.2.0.0/16"}}], "ports": [{"port": 443}]}
    rendered = helm.template({"network": {"metricsFrom": [peer], "runs": {"namespaces": ["art"], "egress": [store]}}})
    spec = rendered.one("NetworkPolicy", "atelier-runs")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"][0] == {"to": [{"podSelector": spec["podSelector"]}]}
    assert [port["port"] for port in spec["egress"][1]["ports"]] == [53, 53]
    assert spec["egress"][2] == store
    operator, scraper = spec["ingress"][1]["from"]
    pods = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert operator["podSelector"]["matchLabels"].items() <= pods.items()
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "atelier-system"}
    assert scraper == peer


def test_a_namespaced_release_makes_policies_in_its_own_namespaces_alone(helm: Helm) -> None:
    values = {"rbac": {"scope": "namespaced", "namespaces": ["art"]}, "crds": {"install": False}}
    said = helm.refusal(values, {"network": {"runs": {"namespaces": ["film"]}}})
    assert "network.runs.namespaces has film, but the release is for art" in said
    assert helm.template(values, {"network": {"runs": {"namespaces": ["art"]}}}).one("NetworkPolicy", "atelier-runs")


def test_monitors_need_their_api(helm: Helm) -> None:
    for name, api in (("operator", SERVICE_MONITOR), ("pods", POD_MONITOR)):
        values = {"monitoring": {name: {"enabled": True}, "labels": {"release": "prometheus"}}}
        assert f"monitoring.{name}.enabled is true, but the cluster does not serve" in helm.refusal(values)
        monitor = helm.template(values, serves=(api,)).one(api.rpartition("/")[2])
        assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_service_monitor_finds_the_service(helm: Helm) -> None:
    rendered = helm.template({"monitoring": {"operator": {"enabled": True}}}, serves=(SERVICE_MONITOR,))
    wanted = rendered.one("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    service = rendered.one("Service")
    assert wanted.items() <= service["metadata"]["labels"].items()
    pod = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pod.items()


# --- profiles -----------------------------------------------------------------------------------------------------------


def test_profiles_come_after_the_crds_of_the_first_installation(helm: Helm) -> None:
    values = {"profiles": {"cluster": {"default": {"image": "runtime"}}}}
    hooks = {
        each["metadata"]["annotations"]["helm.sh/hook"]: each["metadata"]["annotations"].get(
            "helm.sh/hook-delete-policy"
        )
        for each in helm.template(values).of("ClusterTrainingProfile")
    }
    assert hooks == {"post-install,post-rollback": None, "pre-delete": "before-hook-creation,hook-succeeded"}


@pytest.mark.parametrize("upgrade", [True, False], ids=["upgrade", "crds-are-there"])
def test_later_profiles_are_objects_of_the_release(helm: Helm, upgrade: bool) -> None:
    values = {"profiles": {"cluster": {"default": {"image": "runtime"}}, "namespaced": {"art": {"b": {"image": "c"}}}}}
    served = () if upgrade else ("atelier.dev/v1alpha1/ClusterTrainingProfile",)
    rendered = helm.template(values, upgrade=upgrade, serves=served)
    assert rendered.one("ClusterTrainingProfile")["spec"] == {"image": "runtime"}
    assert rendered.one("TrainingProfile")["metadata"]["namespace"] == "art"
    for kind in ("ClusterTrainingProfile", "TrainingProfile"):
        assert "annotations" not in rendered.one(kind)["metadata"]
