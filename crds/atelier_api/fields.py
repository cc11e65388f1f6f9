"""The fields of the API as plain values: one tree, read from the pydantic types.

Error messages (`read`), the CRD (`crdgen`) and the reference page (`docgen`) are made from this tree, so that they cannot
disagree about a name, a bound or a default.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from atelier_api.v1alpha1 import TrainingRun
from atelier_api.v1alpha1.base import format_decimal, parse_decimal

Kind = Literal["block", "variants", "list", "map", "string", "integer", "decimal", "boolean"]


class Missing:
    """The type of `MISSING`: a field without default. `None` is a default of its own."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()


@dataclass(frozen=True)
class Bounds:
    """Range of a number (or of a length). None: no bound on that side."""

    low: float | None = None
    high: float | None = None
    low_excluded: bool = False
    high_excluded: bool = False

    def text(self) -> str:
        """What is allowed, for people: `1–1024`, `more than 0 and at most 1`, `at least 1`, or nothing."""
        low, high = number(self.low), number(self.high)
        if low is None and high is None:
            return ""
        if low is None:
            return f"less than {high}" if self.high_excluded else f"at most {high}"
        least = f"more than {low}" if self.low_excluded else f"at least {low}"
        if high is None:
            return least
        if not self.low_excluded and not self.high_excluded:
            return f"between {low} and {high}" if low.startswith("-") else f"{low}–{high}"
        return f"{least} and {'less than' if self.high_excluded else 'at most'} {high}"


@dataclass(frozen=True)
class Node:
    """One field, list item or map value. `default` is in wire form; `{}` for a block that is filled from its own defaults.

    A `variants` node is a block whose fields depend on its `type`: `fields` holds those of all variants, `variants` says which
    names each has, in order. A field of several variants whose default differs between them has them all in `defaults`.
    """

    kind: Kind
    description: str = ""
    default: Any = MISSING
    nullable: bool = False
    required: bool = False
    bounds: Bounds = Bounds()
    length: Bounds = Bounds()
    pattern: str | None = None
    choices: tuple[str, ...] = ()
    fields: Mapping[str, "Node"] = field(default_factory=dict)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    item: "Node | None" = None


@cache
def tree() -> Node:
    """The tree of `TrainingRun`."""
    return block_node(TrainingRun)


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every node below `node` with its path, in the order of declaration: `spec.data.sources[].uri`, `metadata.labels{}`."""
    for name, child in node.fields.items():
        below = f"{path}.{name}" if path else name
        yield below, child
        yield from walk(child, below)
    if node.item is not None:
        below = path + ("[]" if node.kind == "list" else "{}")
        yield below, node.item
        yield from walk(node.item, below)


def number(value: float | None) -> str | None:
    """A bound as people write it: 10000000, 0.5."""
    return None if value is None else format_decimal(value)


def block_node(block: type[BaseModel]) -> Node:
    """The node of a pydantic block."""
    fields = {info.alias or name: _field_node(info) for name, info in block.model_fields.items()}
    return Node(kind="block", description=(block.__doc__ or "").strip().splitlines()[0], fields=fields)


def _field_node(info: FieldInfo) -> Node:
    node = _typed_node(info.annotation, info.metadata)
    return replace(
        node,
        description=info.description or node.description,
        required=info.is_required(),
        default=_default(info, node),
    )


def _default(info: FieldInfo, node: Node) -> Any:
    if info.default_factory is not None:
        return {}
    if info.default is PydanticUndefined:
        return MISSING
    if node.kind == "decimal" and info.default is not None:
        return format_decimal(info.default)
    return info.default


def _typed_node(annotation: Any, metadata: list[Any]) -> Node:
    """The node of a type with the constraints in `metadata`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _typed_node(arguments[0], [*_flat(arguments[1:]), *metadata])
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        node = _typed_node(members[0], metadata) if len(members) == 1 else _variants_node(members)
        return replace(node, nullable=len(members) < len(arguments))
    return _constrained(_plain_node(annotation, origin, arguments), annotation, metadata)


def _plain_node(annotation: Any, origin: Any, arguments: tuple[Any, ...]) -> Node:
    if origin is Literal:
        return Node(kind="string", choices=arguments)
    if origin is list:
        return Node(kind="list", item=_typed_node(arguments[0], []))
    if origin is dict:
        return Node(kind="map", item=_typed_node(arguments[1], []))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return block_node(annotation)
    kinds: dict[Any, Kind] = {str: "string", int: "integer", bool: "boolean", float: "decimal"}
    return Node(kind=kinds[annotation])


def _variants_node(members: list[Any]) -> Node:
    """Blocks told apart by their `type`, merged into one."""
    blocks = [block_node(member) for member in members]
    variants = {block.fields["type"].choices[0]: tuple(block.fields) for block in blocks}
    fields: dict[str, Node] = {}
    for block in blocks:
        fields = {**block.fields, **fields}
    fields = {name: _shared(name, node, dict(zip(variants, blocks, strict=True))) for name, node in fields.items()}
    tag = replace(
        fields["type"], choices=tuple(variants), description="Kind, which decides the other fields of this block."
    )
    first = list(blocks[0].fields)
    order = ["type", *(name for name in (*first, *fields) if name != "type")]
    return Node(kind="variants", fields={name: {**fields, "type": tag}[name] for name in order}, variants=variants)


def _shared(name: str, first: Node, blocks: Mapping[str, Node]) -> Node:
    """The one node of a field that several variants have: all but the default has to be the same in them."""
    nodes = {kind: block.fields[name] for kind, block in blocks.items() if name in block.fields}
    if name == "type":
        return first
    if any(replace(node, default=first.default) != first for node in nodes.values()):
        raise TypeError(f"the field {name} of {', '.join(nodes)} may differ in its default alone")
    if all(node.default == first.default for node in nodes.values()):
        return first
    return replace(first, defaults={kind: node.default for kind, node in nodes.items()})


def _constrained(node: Node, annotation: Any, metadata: list[Any]) -> Node:
    """`node` with the bounds, lengths and patterns that `metadata` holds."""
    bounds, length, pattern = Bounds(), Bounds(), None
    for item in metadata:
        for attribute, value in _constraints(item):
            match attribute:
                case "ge":
                    bounds = replace(bounds, low=value)
                case "gt":
                    bounds = replace(bounds, low=value, low_excluded=True)
                case "le":
                    bounds = replace(bounds, high=value)
                case "lt":
                    bounds = replace(bounds, high=value, high_excluded=True)
                case "min_length":
                    length = replace(length, low=value)
                case "max_length":
                    length = replace(length, high=value)
                case "pattern":
                    pattern = value
    if annotation is float and not any(getattr(item, "func", None) is parse_decimal for item in metadata):
        raise TypeError("a float of the API must be a Decimal")
    return replace(node, bounds=bounds, length=length, pattern=pattern)


def _constraints(item: Any) -> Iterator[tuple[str, Any]]:
    for attribute in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern"):
        value = getattr(item, attribute, None)
        if value is not None:
            yield attribute, value


def _flat(metadata: tuple[Any, ...]) -> list[Any]:
    """`Field(...)` inside an `Annotated` carries its constraints in its own metadata."""
    flat: list[Any] = []
    for item in metadata:
        flat.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return flat
