"""The CustomResourceDefinitions, made from the types.

python -m atelier_api.crdgen            writes crds/*.atelier.dev.yaml
python -m atelier_api.crdgen --check    exit code 1 when a file is not what would be written
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atelier_api import API_VERSION
from atelier_api.cel import profile_rules, spec_rules
from atelier_api.cel_rule import CelRule
from atelier_api.fields import Node, block_node, tree
from atelier_api.generated import Generated, main
from atelier_api.structural import schema
from atelier_api.transitions import transition_rules
from atelier_api.v1alpha1.base import DECIMAL_PATTERN
from atelier_api.v1alpha1.profile import ClusterTrainingProfile, TrainingProfile
from atelier_api.v1alpha1.status import RunStatus

GROUP, VERSION = API_VERSION.split("/")
FOLDER = Path(__file__).parent.parent

Column = tuple[str, str, str]


@dataclass(frozen=True)
class Resource:
    """A kind of ours, and what `kubectl get` shows of it. Columns below `wide` are for `-o wide`."""

    kind: str
    plural: str
    short: str
    scope: str
    schema: dict[str, Any]
    columns: tuple[Column, ...]
    wide: tuple[Column, ...] = ()
    status: bool = False

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.plural}.{GROUP}.yaml"

    def crd(self) -> dict[str, Any]:
        """The whole object."""
        columns = [_column(column) for column in self.columns]
        columns += [_column(column) | {"priority": 1} for column in self.wide]
        version: dict[str, Any] = {"name": VERSION, "served": True, "storage": True}
        if self.status:
            version["subresources"] = {"status": {}}
        version |= {"additionalPrinterColumns": columns, "schema": {"openAPIV3Schema": self.schema}}
        names = {
            "kind": self.kind,
            "listKind": f"{self.kind}List",
            "plural": self.plural,
            "singular": self.kind.lower(),
            "shortNames": [self.short],
            "categories": ["atelier"],
        }
        if self.status:
            names["categories"] = ["all", "atelier"]
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{self.plural}.{GROUP}"},
            "spec": {"group": GROUP, "names": names, "scope": self.scope, "versions": [version]},
        }

    def text(self) -> str:
        """The file."""
        head = "# Generated from crds/atelier_api by `make crds`. Do not edit.\n"
        return head + yaml.dump(self.crd(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def root_schema() -> dict[str, Any]:
    """The schema of a run. Of its metadata the API server lets a schema restrict the name alone."""
    root = tree()
    name = root.fields["metadata"].fields["name"]
    spec = schema(root.fields["spec"], "") | _validated(spec_rules(), "")
    result = _object(root, spec, {"type": "object", "properties": {"name": _without_description(schema(name, ""))}})
    result["properties"]["status"] = _without_defaults(schema(block_node(RunStatus), ""))
    return result | _validated(transition_rules(), ".spec")


def profile_schema(block: type[TrainingProfile] | type[ClusterTrainingProfile]) -> dict[str, Any]:
    """The schema of a profile."""
    root = block_node(block)
    spec = schema(root.fields["spec"], "") | _validated(profile_rules(), "")
    return _object(root, spec, {"type": "object"})


def _validated(rules: list[CelRule], above: str) -> dict[str, Any]:
    """The rules as the schema holds them; `above` is the path of what their fields lie in."""
    return {
        "x-kubernetes-validations": [
            {"rule": rule.rule, "message": rule.message, "fieldPath": f"{above}.{rule.field}"} for rule in rules
        ]
    }


def _object(root: Node, spec: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": root.description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": root.fields["apiVersion"].description},
            "kind": {"type": "string", "description": root.fields["kind"].description},
            "metadata": metadata,
            "spec": spec,
        },
    }


def resources() -> tuple[Resource, ...]:
    """Every kind of ours."""
    age = ("Age", "date", ".metadata.creationTimestamp")
    profile_columns = (("Image", "string", ".spec.image"), age)
    return (
        Resource(
            kind="TrainingRun",
            plural="trainingruns",
            short="trun",
            scope="Namespaced",
            schema=root_schema(),
            columns=(
                ("Phase", "string", ".status.phase"),
                ("Percent", "integer", ".status.progress.percent"),
                ("Loss", "string", ".status.progress.loss"),
                ("ETA", "integer", ".status.progress.etaSeconds"),
                ("Queue", "string", ".status.queue.name"),
                ("Restarts", "integer", ".status.restarts.counted"),
                age,
            ),
            wide=(
                ("Reason", "string", ".status.reason"),
                ("Family", "string", ".spec.model.family"),
                ("Strategy", "string", ".status.plan.strategy"),
                ("Nodes", "integer", ".spec.parallelism.nodes"),
                ("GPUs", "integer", ".spec.parallelism.gpusPerNode"),
                ("Step", "integer", ".status.progress.step"),
                ("Checkpoint", "integer", ".status.checkpoint.step"),
            ),
            status=True,
        ),
        Resource(
            kind="TrainingProfile",
            plural="trainingprofiles",
            short="tprof",
            scope="Namespaced",
            schema=profile_schema(TrainingProfile),
            columns=profile_columns,
        ),
        Resource(
            kind="ClusterTrainingProfile",
            plural="clustertrainingprofiles",
            short="ctprof",
            scope="Cluster",
            schema=profile_schema(ClusterTrainingProfile),
            columns=profile_columns,
        ),
    )


def _column(column: Column) -> dict[str, Any]:
    name, kind, path = column
    return {"name": name, "type": kind, "jsonPath": path}


def _without_defaults(field: dict[str, Any]) -> dict[str, Any]:
    """A status holds what the operator has found out, and nothing that the API server fills in."""
    result = {name: value for name, value in field.items() if name != "default"}
    if "properties" in result:
        result["properties"] = {name: _without_defaults(child) for name, child in result["properties"].items()}
    if "items" in result:
        result["items"] = _without_defaults(result["items"])
    return result


def _without_description(field: dict[str, Any]) -> dict[str, Any]:
    """Descriptions of metadata are the API server's own."""
    return {name: value for name, value in field.items() if name != "description"}


class _Dumper(yaml.SafeDumper):
    """No anchors, which people do not expect in a manifest; and strings that other YAML readers take for numbers in quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes 1e-08 without quotes, since YAML 1.1 reads it as text. The API server reads a number.
        return self.represent_scalar("tag:yaml.org,2002:str", data, "'" if re.match(DECIMAL_PATTERN, data) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


if __name__ == "__main__":
    main(*(Generated(resource.path, resource.text) for resource in resources()))
