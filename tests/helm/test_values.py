"""What the chart takes from elsewhere is up to date, and its schema refuses what it does not know, at every level."""

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "atelier"
EVERYTHING = {
    "operator": {
        "imagePullSecrets": [{"name": "registry"}],
        "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"anything": "of Kubernetes"}},
    },
    "network": {"metricsFrom": [{"podSelector": {}}]},
    "quotas": {
        "flavors": [
            {"name": "h100", "nodeTaints": [{"key": "a", "effect": "NoSchedule"}], "tolerations": [{"key": "a"}]}
        ],
        "teams": [
            {"name": "a", "namespaces": ["a"], "gpus": [{"flavor": "h100", "quota": 1}], "host": {"memory": "1Ti"}}
        ],
        "priorityClasses": [{"name": "a", "value": 1}],
    },
    "profiles": {
        "cluster": {
            "default": {
                "image": "runtime",
                "gpuClasses": [{"name": "h100", "memory": "80Gi", "nodeSelector": [{"key": "a", "value": "b"}]}],
                "networks": [{"name": "ib", "environment": [{"name": "A", "value": "b"}]}],
                "volumes": [{"name": "models", "mountPath": "/models", "hostPath": "/models"}],
                "storage": {"uri": "s3://runs", "s3": {"region": "eu"}, "credentialsRef": {"name": "runs"}},
                "limits": {"gpus": 8, "nodes": None},
            }
        },
        "namespaced": {"art": {"default": {"image": "runtime"}}},
    },
}
# What Kubernetes defines, and maps whose keys are the user's own words.
OPEN = re.compile(
    r"global|.*Affinity|podSelector|nodeLabels|nodeSelector|labels|podLabels|podAnnotations|requests|limits|profiles\.cluster|namespaced|art"
)

Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def chartgen() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chartgen", ROOT / "helm" / "chartgen.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chartgen"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def merge(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {key: merge(one.get(key), value) for key, value in other.items()}


def full_values() -> dict[str, Any]:
    values: dict[str, Any] = merge(yaml.safe_load((CHART / "values.yaml").read_text()), copy.deepcopy(EVERYTHING))
    return values


def objects(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where there is an object in the values."""
    if isinstance(value, dict):
        yield place
        for key, each in value.items():
            yield from objects(each, (*place, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from objects(each, (*place, number))


def at(values: Any, place: Place) -> Any:
    for step in place:
        values = values[step]
    return values


def closed_objects() -> list[Place]:
    return [place for place in objects(full_values()) if not is_open(place)]


def is_open(place: Place) -> bool:
    if place[:1] == ("profiles",):
        return place in (("profiles", "cluster"), ("profiles", "namespaced"), ("profiles", "namespaced", "art"))
    return any(OPEN.fullmatch(str(step)) for step in place)


def test_what_is_generated_is_up_to_date(chartgen: ModuleType) -> None:
    for file in chartgen.files():
        assert file.difference() == [], f"run `python helm/chartgen.py`: {file.path}"


def test_every_crd_is_in_the_chart(chartgen: ModuleType) -> None:
    generated = {path.name for path in (CHART / "templates" / "crds").iterdir()}
    assert generated == {path.name for path in (ROOT / "crds").glob("*.yaml")}


def test_a_crd_with_template_brackets_is_not_put_into_the_chart(chartgen: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.atelier.dev.yaml"
    path.write_text("# head\nmetadata:\n  name: a.atelier.dev\nspec:\n  description: '{{ x }}'\n")
    with pytest.raises(ValueError, match="template action"):
        chartgen.crd_template(path)


def test_a_crd_whose_metadata_would_be_lost_is_not_put_into_the_chart(chartgen: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.atelier.dev.yaml"
    path.write_text("# head\nmetadata:\n  name: a.atelier.dev\n  labels: {}\nspec: {}\n")
    with pytest.raises(ValueError, match="only the name"):
        chartgen.crd_template(path)


def test_the_versions_are_those_of_the_distribution() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version


def test_the_schema_takes_the_defaults_and_every_example(validator: jsonschema.Draft7Validator) -> None:
    validator.validate(yaml.safe_load((CHART / "values.yaml").read_text()))
    validator.validate(full_values())


def test_the_examples_in_the_comments_are_valid(validator: jsonschema.Draft7Validator) -> None:
    """Each block of comment lines that is indented further than prose is YAML for the key below it."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found = list(commented_examples((CHART / "values.yaml").read_text()))
    assert len(found) >= 5
    for path, example in found:
        changed = copy.deepcopy(values)
        at(changed, path[:-1])[path[-1]] = example
        validator.validate(changed)


def commented_examples(text: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of every example."""
    path: list[str] = []
    example: list[str] = []
    for line in text.splitlines():
        if found := re.fullmatch(r" *#   (.*)", line):
            example.append(found[1])
        elif found := re.match(r"( *)([A-Za-z]+):", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            if example:
                yield tuple(path), yaml.safe_load("\n".join(example))
            example = []


@pytest.mark.parametrize("place", closed_objects(), ids=lambda place: ".".join(map(str, place)) or "root")
def test_a_wrong_word_is_refused_in(validator: jsonschema.Draft7Validator, place: Place) -> None:
    values = full_values()
    at(values, place)["wrongWord"] = 1
    (error,) = validator.iter_errors(values)
    assert "wrongWord" in error.message
    assert tuple(error.absolute_path) == place


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rbac", "scope"), "namespace"),
        (("operator", "replicas"), 0),
        (("operator", "image", "digest"), "latest"),
        (("quotas", "engine"), "volcano"),
        (("webhook", "certificate"), "letsencrypt"),
        (("webhook", "timeoutSeconds"), 30),
        (("webhook", "secret", "caBundle"), "-----BEGIN CERTIFICATE-----"),
        (("quotas", "teams", 0, "gpus", 0, "quota"), "8"),
        (("profiles", "cluster", "default", "gpuClasses", 0, "memory"), "80GB"),
        (("profiles", "cluster", "default", "image"), None),
        (("monitoring", "pods", "interval"), "15"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_is_refused(validator: jsonschema.Draft7Validator, place: Place, value: Any) -> None:
    values = full_values()
    at(values, place[:-1])[place[-1]] = value
    (error,) = validator.iter_errors(values)
    assert tuple(error.absolute_path) == place
