"""What the release may do, and that a namespaced one makes nothing outside of namespaces."""

from collections.abc import Mapping
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]  # the first test on a machine builds helm
pytest_plugins = ("cluster_fixtures",)

Helm = Any  # the fixture of conftest.py
Object = dict[str, Any]
Values = Mapping[str, Any]

TEAMS = {
    "engine": "resourceQuota",
    "flavors": [{"name": "h100"}],
    "teams": [{"name": "art", "namespaces": ["art"], "gpus": [{"flavor": "h100", "quota": 8}]}],
}
NAMESPACED = {"rbac": {"scope": "namespaced"}, "crds": {"install": False}}
POD_MONITOR, SERVICE_MONITOR = "monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/ServiceMonitor"
# Kinds of this chart that lie in a namespace; every other one would be the cluster's.
IN_NAMESPACES = {
    *("Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "Pod"),
    *("Role", "RoleBinding", "ResourceQuota", "LocalQueue", "TrainingProfile", "ServiceMonitor", "PodMonitor"),
}
# What the operator's code does in a namespace, by resource. A verb more or less is a decision: change it here, too.
RIGHTS = {
    ("atelier.dev", "trainingruns"): {"get", "list", "watch", "delete"},
    ("atelier.dev", "trainingruns/status"): {"patch"},
    ("atelier.dev", "trainingruns/finalizers"): {"update"},
    ("atelier.dev", "trainingprofiles"): {"list", "watch"},
    ("jobset.x-k8s.io", "jobsets"): {"get", "list", "watch", "create", "delete"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "delete"},
    ("", "configmaps"): {"get", "create"},
    ("", "services"): {"get", "create"},
    ("", "pods"): {"list", "watch"},
    ("", "resourcequotas"): {"list"},
    ("", "events"): {"create"},
    ("kueue.x-k8s.io", "workloads"): {"list", "watch"},
}
CLUSTER_RIGHTS = {
    ("atelier.dev", "clustertrainingprofiles"): {"list", "watch"},
    ("apiextensions.k8s.io", "customresourcedefinitions"): {"list", "watch"},
    ("", "nodes"): {"get"},
    ("", "pods"): {"delete"},
}
LEASE_RIGHTS = {("coordination.k8s.io", "leases"): {"get", "update", "create"}}


def rights(*roles: Object) -> dict[tuple[str, str], set[str]]:
    """Verbs by group and resource."""
    result: dict[tuple[str, str], set[str]] = {}
    for role in roles:
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    result.setdefault((group, resource), set()).update(rule["verbs"])
    return result


def joined(*tables: dict[tuple[str, str], set[str]]) -> dict[tuple[str, str], set[str]]:
    """Several tables of rights as one."""
    return {key: set().union(*(table.get(key, set()) for table in tables)) for table in tables for key in table}


def test_the_cluster_role_has_the_verbs_that_the_code_uses(helm: Helm) -> None:
    rendered = helm.template({})
    assert rights(rendered.one("ClusterRole", "atelier-operator")) == joined(RIGHTS, CLUSTER_RIGHTS)
    assert rights(rendered.one("Role")) == LEASE_RIGHTS
    named = [rule for rule in rendered.one("Role")["rules"] if rule["verbs"] != ["create"]]
    assert [rule["resourceNames"] for rule in named] == [[rendered.environment()["ATELIER_LEASE_NAME"]]]


def test_every_kind_that_the_operator_knows_has_a_right() -> None:
    from atelier_operator.cluster import KINDS

    known = {(kind.group, kind.plural) for kind in KINDS.values()}
    assert known <= set(RIGHTS | CLUSTER_RIGHTS | LEASE_RIGHTS)


@pytest.mark.parametrize("values", [{}, NAMESPACED])
def test_no_role_has_secrets_shells_logs_or_wildcards(helm: Helm, values: Values) -> None:
    rendered = helm.template(values)
    roles = [*rendered.of("Role"), *rendered.of("ClusterRole")]
    assert roles
    for (group, resource), verbs in rights(*roles).items():
        assert "*" not in {group, resource, *verbs}
        assert resource not in ("secrets", "pods/exec", "pods/log", "pods/attach", "roles", "clusterroles")
        assert not resource.endswith("webhookconfigurations")
        assert not verbs & {"escalate", "bind", "impersonate"}


def test_editors_have_runs_but_no_profiles(helm: Helm) -> None:
    rendered = helm.template({})
    changes = rights(rendered.one("ClusterRole", "atelier-edit"))
    assert set(changes) == {("atelier.dev", "trainingruns")}
    assert rights(rendered.one("ClusterRole", "atelier-view")) == {
        ("atelier.dev", "trainingruns"): {"get", "list", "watch"},
        ("atelier.dev", "trainingprofiles"): {"get", "list", "watch"},
    }
    assert len(helm.template({"rbac": {"aggregate": False}}).of("ClusterRole")) == 1


def test_namespaced_mode_makes_nothing_outside_of_namespaces(helm: Helm) -> None:
    values: Values = {
        "rbac": {"scope": "namespaced", "namespaces": ["film", "art"]},
        "crds": {"install": False},
        "quotas": TEAMS,
        "profiles": {"namespaced": {"art": {"default": {"image": "runtime"}}}},
        "monitoring": {"operator": {"enabled": True}, "pods": {"enabled": True}},
    }
    rendered = helm.template(values, serves=(POD_MONITOR, SERVICE_MONITOR))
    assert {each["kind"] for each in rendered.objects} <= IN_NAMESPACES
    assert all(each["metadata"].get("namespace") for each in rendered.objects)
    roles = [role for role in rendered.of("Role") if role["metadata"]["name"] == "atelier-operator"]
    assert [role["metadata"]["namespace"] for role in roles] == ["art", "film"]
    assert all(rights(role) == RIGHTS for role in roles)
    assert rendered.environment()["ATELIER_NAMESPACES"] == "art,film"
    assert rendered.one("PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["art", "film"]}


def test_cluster_mode_says_no_namespaces(helm: Helm) -> None:
    assert "ATELIER_NAMESPACES" not in helm.template({}).environment()
