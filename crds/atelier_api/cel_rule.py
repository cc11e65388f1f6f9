"""A rule in CEL, and how its expressions are written."""

import json
from dataclasses import dataclass
from typing import Any

from atelier_api.rules import S3_URI, SCHEME


@dataclass(frozen=True)
class CelRule:
    """A condition that must be true of `self`, the spec. `field` is the path below spec that the message is about."""

    field: str
    rule: str
    message: str


def folder_or_s3(field: str) -> str:
    """Whether the field, a path or URI, is what a store can be."""
    return f"(!{matches(field, SCHEME)} || {matches(field, S3_URI, whole=True)})"


def matches(field: str, pattern: str, *, whole: bool = False) -> str:
    """`matches` finds a pattern anywhere, so both ends are anchored where they count."""
    return f"{field}.matches({literal(f'^({pattern})' + ('$' if whole else ''))})"


def literal(value: Any) -> str:
    """A value as a CEL literal, with single quotes: JSON otherwise."""
    if isinstance(value, str):
        return "'" + json.dumps(value)[1:-1].replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
