"""Teams and their GPUs, as Kueue's objects and as ResourceQuotas, and values that contradict each other."""

from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]  # the first test on a machine builds helm
pytest_plugins = ("cluster_fixtures",)

Helm = Any  # the fixture of conftest.py
Values = Mapping[str, Any]

KUEUE = ("kueue.x-k8s.io/v1beta1/ClusterQueue",)
FLAVORS = [
    {"name": "h100", "nodeLabels": {"gpu": "h100"}},
    {"name": "a100"},
    {"name": "mi300", "resource": "amd.com/gpu"},
]
ART = {
    "name": "art",
    "namespaces": ["art"],
    "gpus": [{"flavor": "h100", "quota": 8}, {"flavor": "mi300", "quota": 2}, {"flavor": "a100", "quota": 4}],
    "host": {"cpu": "64"},
}
FILM = {
    "name": "film",
    "namespaces": ["film", "film-dev"],
    "gpus": [{"flavor": "h100", "quota": 4, "borrowingLimit": 0, "lendingLimit": 2}],
}


def quotas(engine: str, *teams: Values, **more: Any) -> Values:
    return {"quotas": {"engine": engine, "flavors": FLAVORS, "teams": list(teams), **more}}


def nominal(group: Values) -> list[tuple[str, str, Any]]:
    """Flavor, resource and quota."""
    return [
        (flavor["name"], resource["name"], resource["nominalQuota"])
        for flavor in group["flavors"]
        for resource in flavor["resources"]
    ]


def test_a_team_has_a_cluster_queue_with_a_group_for_each_kind_of_resource(helm: Helm) -> None:
    spec = helm.template(quotas("kueue", ART, FILM), serves=KUEUE).one("ClusterQueue", "art")["spec"]
    assert spec["cohort"] == "atelier"
    assert spec["namespaceSelector"]["matchExpressions"][0]["values"] == ["art"]
    assert spec["preemption"] == {"withinClusterQueue": "LowerPriority", "reclaimWithinCohort": "Any"}
    assert [group["coveredResources"] for group in spec["resourceGroups"]] == [
        ["nvidia.com/gpu"],
        ["amd.com/gpu"],
        ["cpu", "memory", "ephemeral-storage"],
    ]
    nvidia, amd, host = map(nominal, spec["resourceGroups"])
    assert nvidia == [("h100", "nvidia.com/gpu", 8), ("a100", "nvidia.com/gpu", 4)]
    assert amd == [("mi300", "amd.com/gpu", 2)]
    assert host[:2] == [("atelier-host", "cpu", "64"), ("atelier-host", "memory", "1000Ti")]


def test_limits_of_borrowing_and_lending_may_be_nought(helm: Helm) -> None:
    spec = helm.template(quotas("kueue", FILM), serves=KUEUE).one("ClusterQueue")["spec"]
    (resource,) = spec["resourceGroups"][0]["flavors"][0]["resources"]
    assert resource == {"name": "nvidia.com/gpu", "nominalQuota": 4, "borrowingLimit": 0, "lendingLimit": 2}


def test_each_namespace_of_a_team_has_a_local_queue(helm: Helm) -> None:
    rendered = helm.template(quotas("kueue", ART, FILM, queue="fast"), serves=KUEUE)
    found = {
        (each["metadata"]["namespace"], each["metadata"]["name"], each["spec"]["clusterQueue"])
        for each in rendered.of("LocalQueue")
    }
    assert found == {("art", "fast", "art"), ("film", "fast", "film"), ("film-dev", "fast", "film")}


def test_every_flavor_of_a_cluster_queue_is_rendered(helm: Helm) -> None:
    rendered = helm.template(quotas("kueue", ART), serves=KUEUE)
    flavors = {each["metadata"]["name"]: each["spec"] for each in rendered.of("ResourceFlavor")}
    assert flavors == {"h100": {"nodeLabels": {"gpu": "h100"}}, "a100": {}, "mi300": {}, "atelier-host": {}}


def test_large_priorities_stay_whole_numbers(helm: Helm) -> None:
    classes = [{"name": "urgent", "value": 100_000_000}, {"name": "idle", "value": -5, "description": "When: free."}]
    rendered = helm.template(quotas("kueue", ART, priorityClasses=classes), serves=KUEUE)
    found = [(each["value"], each["description"]) for each in rendered.of("WorkloadPriorityClass")]
    assert found == [(100_000_000, ""), (-5, "When: free.")]


def test_without_kueue_a_team_has_a_resource_quota_over_all_flavors(helm: Helm) -> None:
    rendered = helm.template(quotas("resourceQuota", ART))
    quota = rendered.one("ResourceQuota")
    assert quota["metadata"]["namespace"] == "art"
    assert quota["spec"]["hard"] == {
        "requests.nvidia.com/gpu": "12",
        "requests.amd.com/gpu": "2",
        "requests.cpu": "64",
    }
    assert not any(each["apiVersion"].startswith("kueue") for each in rendered.objects)


def test_no_quotas_by_default(helm: Helm) -> None:
    kinds = {each["kind"] for each in helm.template({}).objects}
    assert not kinds & {"ClusterQueue", "LocalQueue", "ResourceFlavor", "WorkloadPriorityClass", "ResourceQuota"}


NAMESPACED = {"rbac": {"scope": "namespaced"}, "crds": {"install": False}}
PROFILE = {"default": {"image": "runtime"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"rbac": {"scope": "namespaced"}}, "set crds.install to false", id="crds"),
        pytest.param(NAMESPACED | {"profiles": {"cluster": PROFILE}}, "profiles.cluster has default", id="profile"),
        pytest.param(NAMESPACED | quotas("kueue", ART), "quotas.engine is kueue, whose ClusterQueues", id="kueue"),
        pytest.param({"rbac": {"namespaces": ["art"]}}, "rbac.namespaces names art", id="namespaces"),
        pytest.param(quotas("none", ART), "quotas.engine is none, but quotas has teams", id="none"),
        pytest.param(
            quotas("kueue", ART | {"gpus": [{"flavor": "h20", "quota": 1}]}),
            "flavor h20; quotas.flavors has a100, h100, mi300",
            id="flavor",
        ),
        pytest.param(
            quotas("kueue", ART, FILM | {"namespaces": ["art"]}), "namespace art belongs to art and to film", id="owner"
        ),
        pytest.param(quotas("kueue", FILM, cohort=""), "quotas.cohort is empty", id="cohort"),
        pytest.param(
            quotas("resourceQuota", FILM | {"namespaces": ["film"]}), "film has a borrowingLimit", id="borrow"
        ),
        pytest.param(
            quotas("resourceQuota", ART | {"namespaces": ["a", "b"]}), "counts in one: make a team of each", id="two"
        ),
        pytest.param(
            quotas("resourceQuota", ART, priorityClasses=[{"name": "a", "value": 1}]), "WorkloadPriority", id="priority"
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(helm: Helm, values: Values, message: str) -> None:
    assert message in helm.refusal(values, serves=KUEUE)


def test_kueue_must_be_installed_before_its_quotas(helm: Helm) -> None:
    assert "does not serve kueue.x-k8s.io/v1beta1 ClusterQueue" in helm.refusal(quotas("kueue", ART))


@pytest.mark.parametrize(
    "block", ["rbac", "crds", "operator", "network", "monitoring", "quotas", "profiles", "fullnameOverride"]
)
def test_helm_refuses_a_wrong_word_in_each_block(helm: Helm, block: str) -> None:
    values: Values = {f"{block}s": "x"} if block == "fullnameOverride" else {block: {"wrong": True}}
    message = helm.refusal(values)
    assert "additional properties" in message
    assert ("wrong" if block != "fullnameOverride" else "fullnameOverrides") in message
