"""What the chart lets the operator do, read from its templates without helm, for the cluster in memory: a call that no role allows is
refused there as the API server would refuse it."""

from functools import cache
from pathlib import Path

import yaml

from atelier_operator.cluster import KINDS

TEMPLATES = Path(__file__).resolve().parents[2] / "helm" / "atelier" / "templates" / "rbac"
INCLUDE = '{{ include "atelier.rules" . }}'
VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


@cache
def _rights() -> frozenset[tuple[str, str, str]]:
    """Group, resource and verb of everything that an operator for the whole cluster may do."""
    rules = (TEMPLATES / "_rules.tpl").read_text().partition('"atelier.rules" -}}\n')[2].rpartition("{{- end")[0]
    role = (TEMPLATES / "cluster.yaml").read_text().partition("rules:\n")[2].partition("---")[0]
    assert INCLUDE in role
    found = yaml.safe_load(role.replace(INCLUDE, rules))
    return frozenset(
        (group, resource, verb)
        for rule in found
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    )


def is_allowed(verb: str, kind: str, name: str, subresource: str = "") -> bool:
    """Whether the operator may send a request of that HTTP verb for a kind; a GET without a name is a list."""
    where = KINDS[kind]
    resource = f"{where.plural}/{subresource}" if subresource else where.plural
    return (where.group, resource, VERBS.get(verb) or ("get" if name else "list")) in _rights()
