"""What the CEL rules of the CRD are made of: the rule itself, and values as CEL writes them."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CelRule:
    """A condition that must be true of `self`, the spec. `field` is the path below spec that the message is about."""

    field: str
    rule: str
    message: str


def by_family(values: Mapping[str, float]) -> str:
    """The number of the run's family. Few numbers are told apart by names: a map of all families would be built at each use."""
    common, *others = (value for value, _ in Counter(values.values()).most_common())
    cases = [
        f"self.model.family in {literal([name for name, each in values.items() if each == value])} ? {literal(value)} : "
        for value in others
    ]
    return f"({''.join(cases)}{literal(common)})" if cases else literal(common)


def literal(value: Any) -> str:
    """A value as a CEL literal, with single quotes: JSON otherwise."""
    if isinstance(value, str):
        return "'" + json.dumps(value)[1:-1].replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
