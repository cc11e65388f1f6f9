"""Reading a `TrainingRun` from YAML: every mistake at once, each as one sentence with its line.

Two steps, each of which reports all it finds: first every field for itself (unknown keys, types, bounds), then, once each field
is right, the fields against each other and against the model family (`rules`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from atelier_api import rules
from atelier_api.errors import ConfigError
from atelier_api.fields import Node, tree, walk
from atelier_api.problem import Problem, choice, nearest, refused, shown
from atelier_api.v1alpha1 import TrainingRun
from atelier_api.v1alpha1.adapter import LoraAdapter

LARGEST_FILE_BYTES = 1 << 20

PATTERNS = {
    r"^[a-z]([-a-z0-9]*[a-z0-9])?$": "lower-case letters, digits and '-', beginning with a letter and not ending with '-'",
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "lower-case letters, digits and '-', not beginning or ending with '-'",
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": "lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit",
    r"^(auto|dynamic|none|[0-9]+(\.[0-9]+)?)$": 'auto, dynamic, none or a number such as "3.0"',
    r"^[0-9]+(Mi|Gi)$": 'a size such as "80Gi" or "512Mi"',
    r"^<[a-z0-9]+(-[a-z0-9]+)*>$": "lower-case words, digits and '-' between '<' and '>', such as <pixel-knight>",
    r"^https?://[^/ ]+": "a URL such as https://s3.example.org",
}
"""What each pattern of the API means, for people."""


def read_run(path: Path) -> TrainingRun:
    """The run in the file at `path`. Raises ConfigError with one line per mistake."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a TrainingRun YAML file") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; give the path of a TrainingRun YAML file"
        ) from None
    if len(data) > LARGEST_FILE_BYTES:
        raise ConfigError(f"{path} has {len(data)} bytes; a TrainingRun has at most {LARGEST_FILE_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a text file in UTF-8: byte {error.start} is {data[error.start]:#04x}"
        ) from None
    return parse_run(text, str(path))


def parse_run(text: str, where: str) -> TrainingRun:
    """The run in a YAML text. `where` names the text in messages: `run.yaml:12: spec.adapter.rank is 0; …`."""
    document, lines = _load(text, where)
    found = problems(document)
    if not found:
        return validated(document)
    ordered = sorted(found, key=lambda problem: _line(problem.path, lines))
    raise ConfigError("\n".join(f"{where}:{_line(problem.path, lines)}: {problem}" for problem in ordered))


def problems(document: object) -> list[Problem]:
    """Everything wrong with a parsed document; empty when it is a valid run."""
    try:
        run = validated(document)
    except ValidationError as error:
        return [*_field_problems(error), *rules.unknown_family(document)]
    return rules.broken(run)


def validated(document: object) -> TrainingRun:
    """The run in a parsed document whose fields are right each for itself. Strict, as the API server is: "16" is no integer, and
    keys are camelCase. Raises pydantic.ValidationError, which `problems` puts into words."""
    return TrainingRun.model_validate(_with_adapter_type(document), strict=True, by_alias=True, by_name=False)


def _with_adapter_type(document: object) -> object:
    """The document with `type: lora` in an adapter that has none."""
    match document:
        case {"spec": {"adapter": dict() as adapter, **blocks}, **rest} if "type" not in adapter:
            default = LoraAdapter.model_fields["type"].default
            return {**rest, "spec": {**blocks, "adapter": {**adapter, "type": default}}}
    return document


def _field_problems(error: ValidationError) -> Iterator[Problem]:
    for entry in error.errors(include_url=False):
        path, node, key = _locate(entry["loc"])
        yield _problem(entry["type"], path, node, {**entry.get("ctx", {}), "key": key, "input": entry["input"]})


def _locate(loc: tuple[int | str, ...]) -> tuple[str, Node, int | str | None]:
    """Path and node of an error, and the last key where that names no field (the node is then the block around it)."""
    path, node = "", tree()
    tag: str | None = None
    for step in loc:
        if step == "[key]":
            continue
        if node.kind == "variants" and step in node.variants and tag is None:
            tag = str(step)
            continue
        if node.kind in ("list", "map"):
            path = f"{path}[{step}]" if node.kind == "list" else f"{path}.{step}"
            assert node.item is not None
            node, tag = node.item, None
            continue
        allowed = node.variants[tag] if tag else tuple(node.fields)
        path = f"{path}.{step}" if path else str(step)
        if step not in allowed:
            return path, node, step
        node, tag = node.fields[str(step)], None
    return path, node, None


def _problem(kind: str, path: str, node: Node, context: Mapping[str, Any]) -> Problem:
    """The sentence for one pydantic error. The test suite walks every kind that our types can produce."""
    value = context["input"]
    match kind:
        case "extra_forbidden" | "invalid_key":
            return Problem(path, value, f"{path} is not a field{_known(path, node, context['key'])}")
        case "missing":
            return Problem(path, None, f"{path} is missing; {_lower(node.description)}")
        case "union_tag_invalid" | "union_tag_not_found":
            tag = context.get("tag")
            return refused(f"{path}.type", tag, choice(tag, node.variants))
        case "literal_error":
            return refused(path, value, choice(value, node.choices))
        case "value_error" if node.kind != "decimal":
            return Problem(path, value, f"{path}: {context['error']}")
        case "too_short" | "too_long":
            return Problem(path, value, f"{path} has {len(value)} items; must have {node.length.text()}")
        case "string_too_short" | "string_too_long":
            return Problem(path, value, f"{path} has {len(value)} characters; must have {node.length.text()}")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return refused(path, value, f"must be {node.bounds.text()}")
        case "string_unicode":
            return refused(path, "?", "must be text in UTF-8")
    return refused(path or "the document", value, f"must be {_allowed(node)}{_hint(node, value)}")


def _known(path: str, node: Node, key: Any) -> str:
    """Where the unknown `key` of the block `node` may belong."""
    if node.kind == "variants" and key in node.fields:
        owners = [tag for tag, names in node.variants.items() if key in names]
        return f" of this type; it belongs to type {' or '.join(owners)}"
    near = nearest(key, node.fields)
    if near:
        return f"; did you mean {near}?"
    elsewhere = [other for other, _ in walk(tree()) if other.rsplit(".", 1)[-1] == str(key)]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return f"; {path.rpartition('.')[0] or 'the document'} has {', '.join(node.fields)}"


def _allowed(node: Node) -> str:
    """What a value of the node must be."""
    bounds = f", {node.bounds.text()}" if node.bounds.text() else ""
    match node.kind:
        case "integer":
            return f"a whole number{bounds}"
        case "decimal":
            return f'a decimal such as "0.1" or "1e-4"{bounds}'
        case "boolean":
            return "true or false"
        case "list":
            return "a list"
        case "map":
            return "a mapping of text to text"
        case "block" | "variants":
            return f"a mapping with the keys {', '.join(node.fields)}"
    return PATTERNS.get(node.pattern or "", f"text that matches {node.pattern}" if node.pattern else "text")


def _hint(node: Node, value: Any) -> str:
    if value is None and not node.required:
        return "; leave the line out for the default"
    if node.kind == "integer" and isinstance(value, str) and value.isdecimal():
        return "; leave out the quotes"
    if node.kind == "string" and not node.pattern and isinstance(value, (bool, int, float)):
        return f'; put it in quotes: "{shown(value)}"'
    return ""


def _lower(description: str) -> str:
    """The description as the second half of a sentence."""
    return description[:1].lower() + description[1:].rstrip(".")


class _Loader(yaml.SafeLoader):
    """Plain YAML; dates stay text, as they do for the API server."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _load(text: str, where: str) -> tuple[object, dict[str, int]]:
    """The document in `text`, and the line of each path."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{where} is empty; must hold a TrainingRun")
        lines: dict[str, int] = {}
        _note_lines(root, "", lines, set())
        return loader.construct_document(root), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        detail = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}:{line}: not valid YAML: {detail}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML for a TrainingRun: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # PyYAML lets the errors of its scalar constructors (`!!int x`, `!!timestamp y`) through.
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _note_lines(node: yaml.Node, path: str, lines: dict[str, int], seen: set[int]) -> None:
    """Fills `lines` with the line of each path below `node`, and refuses keys that stand twice in one mapping.

    Each node is visited once, so that anchors that refer to each other end.
    """
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, f"{path}[{index}]", lines, seen)
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in keys and name != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {name} stands twice", problem_mark=key.start_mark)
            keys.add(name)
            below = f"{path}.{name}" if path else name
            lines[below] = key.start_mark.line + 1
            _note_lines(value, below, lines, seen)


def _line(path: str, lines: Mapping[str, int]) -> int:
    """The line of `path`, or of the nearest block around it that is in the text."""
    while path and path not in lines:
        cut = max(path.rfind("."), path.rfind("["))
        path = path[: max(cut, 0)]
    return lines.get(path, 1)
