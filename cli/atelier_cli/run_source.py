"""A run from its file, with the changes of `--set` laid over it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from atelier_api.errors import ConfigError
from atelier_api.fields import Node, tree, walk
from atelier_api.problem import nearest
from atelier_api.read import parse_run, problems, read_run
from atelier_api.v1alpha1 import TrainingRun

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def load(path: Path, changes: Sequence[str] = ()) -> TrainingRun:
    """The run in the file, changed. Raises ConfigError with one line per mistake, in the file or in `changes`."""
    if not changes:
        return read_run(path)
    document = _raw(path)
    for change in changes:
        _apply(document, change)
    found = problems(document)
    if found:
        raise ConfigError("\n".join(f"{path} with --set: {problem}" for problem in found))
    return parse_run(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), str(path))


def _raw(path: Path) -> dict[str, Any]:
    """The file as it is, before any check; where it is not even a mapping, the check's own error."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_PlainLoader)
    except (OSError, ValueError, yaml.YAMLError):
        document = None
    if not isinstance(document, dict):
        read_run(path)
        raise ConfigError(f"{path} must hold a TrainingRun")
    return document


class _PlainLoader(yaml.SafeLoader):
    """Dates stay text."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _apply(document: dict[str, Any], change: str) -> None:
    path, sign, text = change.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set is {change!r}; must be a path and a value, such as hyperparameters.steps=500")
    if re.split(r"[.\[]", path)[0] not in tree().fields:
        path = f"spec.{path}"
    steps, node = _resolve(path)
    _put(document, steps, _value(text, node), path)


def _resolve(path: str) -> tuple[list[str | int], Node]:
    """The keys of a path, and the field it names."""
    steps: list[str | int] = []
    node, known = tree(), ""
    position = 0
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None:
            raise _unknown(path)
        position = match.end()
        name = match[1] if match[2] is None else match[2]
        if node.item is not None and node.kind == "list":
            if not name.isdigit():
                raise ConfigError(f"--set {path}: {known} is a list; name an item, such as {known}[0]")
            steps.append(int(name))
            node = node.item
        elif node.item is not None:
            steps.append(name)
            node = node.item
        elif name in node.fields and match[2] is None:
            steps.append(name)
            node = node.fields[name]
        else:
            raise _unknown(path)
        known = path[:position]
    return steps, node


def _unknown(path: str) -> ConfigError:
    """Fields of that name elsewhere, else the path that is spelt most alike."""
    paths = [known.replace("[]", "").replace("{}", "") for known, _ in walk(tree())]
    plain = re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "", path)
    leaf = plain.rpartition(".")[2]
    named = [known for known in paths if known.rpartition(".")[2] == leaf]
    near = " or ".join(named[:3]) or nearest(plain, paths)
    return ConfigError(f"--set {path}: there is no such field{f'; did you mean {near}?' if near else ''}")


def _value(text: str, node: Node) -> Any:
    """The value as it would stand in the file. Text and decimals are taken as they are, without quotes."""
    if text == "null" and node.nullable:
        return None
    if node.kind in ("string", "decimal"):
        return text
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError:
        return text  # the check says what is allowed


def _put(document: dict[str, Any], steps: Sequence[str | int], value: Any, path: str) -> None:
    """Set the value at `steps`; blocks that are not there are made, a list may grow by one item."""
    here: Any = document
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if isinstance(step, int):
            if not isinstance(here, list) or step > len(here):
                raise ConfigError(
                    f"--set {path}: there are {len(here) if isinstance(here, list) else 0} items; the first is [0]"
                )
            if step == len(here):
                here.append(None)
        elif not isinstance(here, dict):
            raise ConfigError(f"--set {path}: what stands above {step} in the file is no mapping")
        if following is None:
            here[step] = value
            return
        if isinstance(here, dict):
            here.setdefault(step, None)
        if here[step] is None:
            here[step] = [] if isinstance(following, int) else {}
        here = here[step]
