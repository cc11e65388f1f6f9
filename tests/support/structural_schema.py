"""What the API server does with an object, as far as the schema goes: defaults, structure, then CEL. For tests without a cluster."""

import copy
from functools import cache
from typing import Any

import cel
from jsonschema import Draft4Validator

from atelier_api.crdgen import root_schema

Schema = dict[str, Any]


def violations(document: Any) -> list[str]:
    """Paths of what the CRD refuses; empty when the API server would take the object. CEL runs only on sound structure."""
    schema = _root()
    broken = sorted(_dotted(error.absolute_path) for error in _validator().iter_errors(document))
    if broken or not isinstance(document, dict):
        return broken or [""]
    filled = copy.deepcopy(document)
    fill_defaults(schema, filled)
    return sorted({*_unequal(schema, filled, ""), *_cel(schema, filled, "")})


def refused_updates(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Paths that the rules of the whole object refuse when `new` replaces `old`. Defaults are filled in on both sides."""
    filled = [copy.deepcopy(document) for document in (old, new)]
    for document in filled:
        fill_defaults(_root(), document)
    before, after = map(_without_null, filled)
    context = cel.Context({"self": after, "oldSelf": before})
    return [
        rule["fieldPath"].lstrip(".")
        for rule in _root()["x-kubernetes-validations"]
        if not _program(rule["rule"]).execute(context)
    ]


def fill_defaults(schema: Schema, value: Any) -> None:
    """Put the schema's defaults into `value`, outside in, as the API server does. Null stays where it is allowed."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if value.get(name) is None and not (name in value and child.get("nullable")):
                value.pop(name, None)
                if "default" in child:
                    value[name] = copy.deepcopy(child["default"])
            if name in value:
                fill_defaults(child, value[name])
    elif isinstance(value, list):
        for item in value:
            fill_defaults(schema["items"], item)


@cache
def _root() -> Schema:
    return root_schema()


@cache
def _validator() -> Draft4Validator:
    plain = _plain(_root())
    del plain["properties"]["metadata"]["additionalProperties"]  # the API server checks metadata itself
    return Draft4Validator(plain)


def _plain(schema: Schema) -> Schema:
    """The structural schema as plain JSON schema: null where it may be (or is replaced by a default), unknown keys refused."""
    plain = {
        key: value for key, value in schema.items() if not key.startswith("x-") and key not in ("nullable", "format")
    }
    if schema.get("nullable") or "default" in schema:
        plain["type"] = [schema["type"], "null"]
        if "enum" in schema:
            plain["enum"] = [*schema["enum"], None]
    if "properties" in schema:
        plain["properties"] = {name: _plain(child) for name, child in schema["properties"].items()}
        plain["additionalProperties"] = False
    if "items" in schema:
        plain["items"] = _plain(schema["items"])
    return plain


def _unequal(schema: Schema, value: Any, path: str) -> list[str]:
    """Lists that name an item twice."""
    found = []
    for name, child in schema.get("properties", {}).items():
        if isinstance(value, dict) and value.get(name) is not None:
            found += _unequal(child, value[name], f"{path}.{name}".lstrip("."))
    kind = schema.get("x-kubernetes-list-type")
    if kind in ("set", "map") and isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", [])
        items = [tuple(item[key] for key in keys) if kind == "map" else item for item in value]
        if len(set(items)) < len(items):
            found.append(path)
    return found


def _cel(schema: Schema, value: Any, path: str) -> list[str]:
    if value is None:
        return []
    rules = [rule for rule in schema.get("x-kubernetes-validations", []) if "oldSelf" not in rule["rule"]]
    found = []
    if rules:  # the others run on updates only
        context = cel.Context({"self": _without_null(value)})
        refused = (rule for rule in rules if not _program(rule["rule"]).execute(context))
        found = [(path + rule.get("fieldPath", "")).lstrip(".") for rule in refused]
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name in value:
                found += _cel(child, value[name], f"{path}.{name}".lstrip("."))
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += _cel(schema["items"], item, f"{path}[{index}]")
    return found


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def _without_null(value: Any) -> Any:
    """`has` is false for null in the API server."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


def _dotted(path: Any) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.lstrip(".")
