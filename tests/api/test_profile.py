"""Profiles: what the types refuse, the CRD refuses as well."""

import copy
import re
from typing import Any

import cel
import pytest
from jsonschema import Draft4Validator
from pydantic import ValidationError

from atelier_api.crdgen import profile_schema
from atelier_api.v1alpha1.profile import ClusterTrainingProfile, TrainingProfile, TrainingProfileSpec
from structural_schema import fill_defaults

Object = dict[str, Any]

SMALLEST: Object = {"image": "registry.example/atelier@sha256:00"}
SCHEMA = profile_schema(TrainingProfile)["properties"]["spec"]


def crd_refuses(spec: Object) -> list[str]:
    """Fields that the CRD's rules and map lists refuse, as the API server checks them."""
    filled = copy.deepcopy(spec)
    fill_defaults(SCHEMA, filled)
    rules = SCHEMA["x-kubernetes-validations"]
    found = [rule["fieldPath"] for rule in rules if not cel.compile(rule["rule"]).execute({"self": filled})]
    for name, field in SCHEMA["properties"].items():
        if field.get("x-kubernetes-list-type") == "map":
            (key,) = field["x-kubernetes-list-map-keys"]
            keys = [item[key] for item in filled[name]]
            found += [f".{name}"] if len(set(keys)) < len(keys) else []
    return found


def volume(**kinds: str) -> Object:
    return {"volumes": [{"name": "data", "mountPath": "/data", **kinds}]}


def tolerating(**toleration: str) -> Object:
    return {"gpuClasses": [{"name": "a", "memory": "80Gi", "tolerations": [toleration]}]}


def gpu(name: str) -> Object:
    return {"name": name, "memory": "80Gi"}


def mount(name: str, claim: str) -> Object:
    return {"name": name, "mountPath": f"/{claim}", "persistentVolumeClaim": claim}


SOUND: dict[str, Object] = {
    "the smallest": {},
    "a folder of the node": volume(hostPath="/mnt"),
    "a claim": volume(persistentVolumeClaim="data"),
    "NFS": volume(nfsServer="nfs.example"),
    "NFS with a path": volume(nfsServer="nfs.example", nfsPath="/export"),
    "any taint": tolerating(),
    "a taint that is there": tolerating(key="a", operator="Exists"),
    "a taint with a value": tolerating(key="a", operator="Equal", value="b"),
    "a taint with an empty value": tolerating(key="a", operator="Equal", value=""),
    "two kinds of GPUs": {"gpuClasses": [gpu("a"), gpu("b")]},
    "two volumes": {"volumes": [mount("a", "x"), mount("b", "y")]},
}
BROKEN: dict[str, tuple[Object, str, str]] = {
    "a volume of no kind": (
        volume(),
        ".volumes",
        "a volume has exactly one of hostPath, persistentVolumeClaim, nfsServer; data has none",
    ),
    "a volume of two kinds": (volume(hostPath="/a", nfsServer="b"), ".volumes", "data has hostPath and nfsServer"),
    "an NFS path without server": (
        volume(hostPath="/a", nfsPath="/b"),
        ".volumes",
        "nfsPath goes with nfsServer; data has hostPath",
    ),
    "Equal without value": (tolerating(key="a", operator="Equal"), ".gpuClasses", "key is 'a', value is None"),
    "Equal without key": (tolerating(operator="Equal", value="b"), ".gpuClasses", "key is None, value is 'b'"),
    "Exists with a value": (tolerating(key="a", value="b"), ".gpuClasses", "one with Exists has no value"),
    "a GPU class twice": (
        {"gpuClasses": [gpu("a"), gpu("b"), gpu("a")]},
        ".gpuClasses",
        "gpuClasses has the name 'a' twice",
    ),
    "a network twice": (
        {"networks": [{"name": "ib"}, {"name": "ib"}]},
        ".networks",
        "networks has the name 'ib' twice",
    ),
    "a volume twice": ({"volumes": [mount("a", "x"), mount("a", "y")]}, ".volumes", "volumes has the name 'a' twice"),
}


@pytest.mark.parametrize("fields", SOUND.values(), ids=SOUND)
def test_a_sound_profile_is_taken_by_both(fields: Object) -> None:
    TrainingProfileSpec.model_validate(SMALLEST | fields)
    assert crd_refuses(SMALLEST | fields) == []


@pytest.mark.parametrize(("fields", "path", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_profile_is_refused_by_both(fields: Object, path: str, words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        TrainingProfileSpec.model_validate(SMALLEST | fields)
    assert crd_refuses(SMALLEST | fields) == [path]


PATTERNS: dict[str, tuple[str, list[str], list[str]]] = {
    "cpu": ("cpu", ["1", "0.5", "1.25", "500m"], ["8Gi", "1k", "m", "-1", "0.5m", "0.0001"]),
    "memory": ("memory", ["8Gi", "512Mi", "1.5Gi", "1000000"], ["500m", "8gb", "", "1e9"]),
}


@pytest.mark.parametrize(("field", "sound", "broken"), PATTERNS.values(), ids=PATTERNS)
def test_quantities_are_those_that_make_sense(field: str, sound: list[str], broken: list[str]) -> None:
    pattern = SCHEMA["properties"]["resources"]["properties"][field]
    for text in sound:
        TrainingProfileSpec.model_validate(SMALLEST | {"resources": {field: text}})
        assert Draft4Validator({"pattern": pattern["pattern"]}).is_valid(text)
    for text in broken:
        with pytest.raises(ValidationError):
            TrainingProfileSpec.model_validate(SMALLEST | {"resources": {field: text}})
        assert not Draft4Validator({"pattern": pattern["pattern"]}).is_valid(text)


@pytest.mark.parametrize("uri", ["runs", "gs://bucket", "s3://", "hf://a/b"])
def test_the_default_store_is_one_that_pods_can_reach(uri: str) -> None:
    with pytest.raises(ValidationError):
        TrainingProfileSpec.model_validate(SMALLEST | {"storage": {"uri": uri}})


def test_both_kinds_of_profile_have_the_same_spec_and_rules() -> None:
    assert profile_schema(ClusterTrainingProfile)["properties"]["spec"] == SCHEMA
    assert len(SCHEMA["x-kubernetes-validations"]) == 3
