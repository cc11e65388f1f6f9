"""The CRD is structural, and says what the types say."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from atelier_api import crdgen, docgen, structural
from atelier_api.cel import spec_rules
from atelier_api.fields import MISSING, Node, block_node, tree, walk
from atelier_api.read import problems
from atelier_api.v1alpha1.profile import ClusterTrainingProfile, TrainingProfile
from atelier_api.v1alpha1.status import RunStatus
from run_documents import document
from structural_schema import fill_defaults, violations

Schema = dict[str, Any]

ALLOWED = {
    *(
        "type",
        "description",
        "default",
        "nullable",
        "enum",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "properties",
        "required",
    ),
    *("items", "minLength", "maxLength", "minItems", "maxItems", "x-kubernetes-validations"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema below a schema, with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")


RESOURCES = {resource.kind: resource for resource in crdgen.resources()}
RUN = RESOURCES["TrainingRun"]
ROOT = RUN.schema
NODES = dict(nodes(ROOT))
BLOCKS = {"TrainingProfile": TrainingProfile, "ClusterTrainingProfile": ClusterTrainingProfile}


@pytest.mark.parametrize("kind", RESOURCES)
def test_every_node_has_one_type_and_no_key_that_a_structural_schema_forbids(kind: str) -> None:
    for path, schema in nodes(RESOURCES[kind].schema):
        if path == "metadata":
            continue
        assert isinstance(schema.get("type"), str), path
        assert set(schema) <= ALLOWED, path
        assert ("properties" in schema) == (schema["type"] == "object"), path
        assert ("items" in schema) == (schema["type"] == "array"), path
        assert schema["type"] != "number", path


def test_every_field_of_the_types_is_in_the_schema_and_no_other() -> None:
    ours = {path for path, _ in walk(tree()) if not path.startswith("metadata")}
    status = {f"status.{path}" for path, _ in walk(block_node(RunStatus))}
    theirs = {path for path in NODES if path and not path.startswith("metadata")}
    assert theirs == ours | status | {"status"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_field_of_a_profile_is_in_its_schema_and_no_other(kind: str) -> None:
    ours = {path for path, _ in walk(block_node(BLOCKS[kind]))}
    theirs = {path for path, _ in nodes(RESOURCES[kind].schema) if path not in ("", "metadata")}
    assert theirs == ours


def test_the_api_server_fills_nothing_into_the_status() -> None:
    assert [path for path, schema in NODES.items() if path.startswith("status") and "default" in schema] == []


def test_every_field_has_a_description() -> None:
    bare = [
        path
        for path, schema in NODES.items()
        if "description" not in schema and not path.endswith("[]") and "metadata" not in path
    ]
    assert bare == []


def test_every_default_is_that_of_the_type_or_left_to_the_description() -> None:
    for path, node in walk(tree()):
        if path not in NODES or path.startswith("metadata"):
            continue
        schema = NODES[path]
        if node.default in (MISSING, None):
            assert "default" not in schema, path
        elif path.startswith("spec.adapter.") and path != "spec.adapter.type" and "[]" not in path:
            # What an item of a list has, it has in each type that has the list.
            assert "default" not in schema, path
            assert "; default " in schema["description"], path
        else:
            assert schema["default"] == node.default, path


def test_every_default_is_itself_valid() -> None:
    """The API server refuses a CRD whose defaults are not."""
    filled = document()
    fill_defaults(ROOT, filled)
    assert filled["spec"]["storage"]["checkpoint"]["keepLast"] == 3
    assert filled["spec"]["adapter"] == {"type": "lora"}
    assert violations(filled) == []
    assert problems(filled) == []


def test_a_block_with_required_fields_has_no_default() -> None:
    for path, schema in NODES.items():
        if schema.get("required"):
            assert "default" not in schema, path


def test_texts_that_other_yaml_readers_take_for_numbers_are_quoted() -> None:
    bare = re.findall(r"default: (-?[0-9.]+(?:[eE][-+]?[0-9]+)?)$", RUN.text(), re.MULTILINE)
    assert all(re.fullmatch(r"-?[0-9]+", number) for number in bare)
    assert "default: '1e-08'" in RUN.text()


@pytest.mark.parametrize("kind", RESOURCES)
def test_the_file_is_yaml_that_reads_back_as_the_object_without_anchors(kind: str) -> None:
    assert yaml.safe_load(RESOURCES[kind].text()) == RESOURCES[kind].crd()
    assert "&id" not in RESOURCES[kind].text()


def test_every_rule_names_a_field_and_its_cost_can_be_told() -> None:
    for rule in spec_rules():
        schema = NODES[f"spec.{rule.field}"]
        assert "oldSelf" not in rule.rule
        assert schema["type"] != "array" or "maxItems" in schema


@pytest.mark.parametrize("kind", RESOURCES)
def test_columns_show_fields_that_exist(kind: str) -> None:
    known = dict(nodes(RESOURCES[kind].schema))
    version = RESOURCES[kind].crd()["spec"]["versions"][0]
    for column in version["additionalPrinterColumns"]:
        path = column["jsonPath"].removeprefix(".")
        assert path == "metadata.creationTimestamp" or known[path]["type"] == column["type"]


def test_names_are_those_that_users_type() -> None:
    names = RUN.crd()["spec"]["names"]
    assert (names["plural"], names["shortNames"], names["categories"]) == ("trainingruns", ["trun"], ["all", "atelier"])


@pytest.mark.parametrize("kind", RESOURCES)
def test_the_generated_crd_in_the_tree_is_up_to_date(kind: str) -> None:
    assert RESOURCES[kind].path.read_text() == RESOURCES[kind].text(), "run `make crds`"


def test_the_generated_page_in_the_tree_is_up_to_date() -> None:
    assert docgen.PATH.read_text() == docgen.text(), "run `make crds`"


def test_a_range_of_a_decimal_is_a_rule_with_doubles() -> None:
    rules = {
        path: schema["x-kubernetes-validations"][0]["rule"]
        for path, schema in NODES.items()
        if "x-kubernetes-validations" in schema
    }
    assert rules["spec.hyperparameters.learningRate"] == "double(self) > 0.0 && double(self) <= 1.0"
    assert rules["spec.objective.timesteps.logitMean"] == "double(self) >= -10.0 && double(self) <= 10.0"
    decimals = {path for path, node in walk(tree()) if node.kind == "decimal"}
    assert decimals <= set(rules)


def test_a_whole_number_with_an_open_range_is_refused() -> None:
    from atelier_api.fields import Bounds

    with pytest.raises(AssertionError, match="closed ranges"):
        structural.schema(Node(kind="integer", bounds=Bounds(0, 1, low_excluded=True)), "x")
