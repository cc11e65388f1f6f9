"""The structural schema of a node of the API: what the API server checks without rules between fields.

Each field has one type, nothing is by reference. Kubernetes has no floats, so a decimal is a string with a pattern, and its range a
CEL rule. The variants of the adapter become one object, whose `type` decides by CEL which fields it may have; those have no
default here (a default would put LoRA's rank into every full-rank run).
"""

from collections.abc import Mapping
from typing import Any

import yaml

from atelier_api.families import FAMILIES
from atelier_api.fields import MISSING, Bounds, Node
from atelier_api.v1alpha1.base import DECIMAL_PATTERN, LONGEST_DECIMAL

SETS = ("publish.formats",)
"""Lists whose items differ, by their path below spec or status."""

MAPS = {
    "data.sources": "uri",
    "conditions": "type",
    "attempts": "number",
    "gpuClasses": "name",
    "networks": "name",
    "volumes": "name",
}
"""Lists of blocks that differ in a field."""


def schema(node: Node, path: str) -> dict[str, Any]:
    """The structural schema of a node; `path` is its place below spec."""
    result: dict[str, Any] = {"type": _TYPES[node.kind]}
    if node.description:
        result["description"] = node.description
    if node.default is not MISSING and node.default is not None:
        result["default"] = node.default
    if node.nullable:
        result["nullable"] = True
    match node.kind:
        case "block" | "variants":
            result |= _object(node, path)
        case "list":
            assert node.item is not None
            result |= {"items": schema(node.item, f"{path}[]")} | _sized(node.length, "Items") | _list_type(path)
        case "integer":
            result |= {"format": "int64"} | _range(node.bounds)
        case "decimal":
            result |= {"pattern": DECIMAL_PATTERN, "maxLength": LONGEST_DECIMAL} | _decimal_range(node.bounds)
        case "string":
            result |= _text(node, path)
    return result


_TYPES = {
    "block": "object",
    "variants": "object",
    "list": "array",
    "string": "string",
    "decimal": "string",
    "integer": "integer",
    "boolean": "boolean",
}


def _object(node: Node, path: str) -> dict[str, Any]:
    properties = {name: schema(child, f"{path}.{name}" if path else name) for name, child in node.fields.items()}
    if node.kind == "variants":
        for name in node.fields:
            if name != "type":
                kinds = [kind for kind, names in node.variants.items() if name in names]
                _belongs_to(properties[name], kinds, node.fields[name].defaults)
    required = [name for name, child in node.fields.items() if child.required]
    return {"properties": properties} | ({"required": required} if required else {})


def _belongs_to(field: dict[str, Any], kinds: list[str], defaults: Mapping[str, Any]) -> None:
    """Say which types have the field, and move its default from the schema to the description."""
    default = field.pop("default", None)
    text = f"{field.get('description', '')} Only for type {' and '.join(kinds)}".strip()
    shown = ", ".join(f"{_inline(other)} for {kind}" for kind, other in defaults.items()) or _inline(default)
    field["description"] = f"{text}." if default is None else f"{text}; default {shown}."


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _text(node: Node, path: str) -> dict[str, Any]:
    if path == "model.family":
        return {"enum": list(FAMILIES)}
    if node.choices:
        return {"enum": list(node.choices)}
    return ({"pattern": node.pattern} if node.pattern else {}) | _sized(node.length, "Length")


def _list_type(path: str) -> dict[str, Any]:
    if path in SETS:
        return {"x-kubernetes-list-type": "set"}
    if path in MAPS:
        return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [MAPS[path]]}
    return {"x-kubernetes-list-type": "atomic"}


def _sized(length: Bounds, what: str) -> dict[str, Any]:
    limits = {f"min{what}": length.low, f"max{what}": length.high}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _range(bounds: Bounds) -> dict[str, Any]:
    assert not bounds.low_excluded, "whole numbers have closed ranges"
    assert not bounds.high_excluded, "whole numbers have closed ranges"
    return {name: limit for name, limit in {"minimum": bounds.low, "maximum": bounds.high}.items() if limit is not None}


def _decimal_range(bounds: Bounds) -> dict[str, Any]:
    low = f"double(self) {'>' if bounds.low_excluded else '>='} {bounds.low:.1f}" if bounds.low is not None else ""
    high = f"double(self) {'<' if bounds.high_excluded else '<='} {bounds.high:.1f}" if bounds.high is not None else ""
    rule = " && ".join(part for part in (low, high) if part)
    return {"x-kubernetes-validations": [{"rule": rule, "message": f"must be {bounds.text()}"}]} if rule else {}
