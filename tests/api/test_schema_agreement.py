"""The CRD and the reader take the same documents: what one accepts, the other does, and they name the same fields."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atelier_api.fields import Node, tree, walk
from atelier_api.problem import Problem
from atelier_api.read import problems
from run_documents import Document, document, documents, places, with_value, wrong_values
from structural_schema import violations

quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


IN_TYPE = "spec.storage.checkpoint"
"""The one rule between fields that a pydantic type checks itself."""


def blamed(found: list[Problem]) -> set[str]:
    """The fields in problems as CEL names them: without indices."""
    return {_without_index(problem.path) for problem in found}


def _without_index(path: str) -> str:
    return path.split("[", maxsplit=1)[0]


@quick
@given(documents())
@example(document(data__resolution=16, data__bucketAlign=24))
def test_rules_and_cel_refuse_the_same_fields(drawn: Document) -> None:
    said = {_without_index(path) for path in violations(drawn)}
    if IN_TYPE in said:
        said = {IN_TYPE}  # the reader tells it with the fields, before it looks at rules
    assert said == blamed(problems(drawn))


@quick
@given(documents(), st.data())
def test_a_field_made_wrong_is_refused_by_both(drawn: Document, data: st.DataObject) -> None:
    place, node = data.draw(st.sampled_from(list(places(drawn, tree(), ()))))
    wrong = data.draw(st.sampled_from(list(wrong_values(node))))
    broken = with_value(drawn, place, wrong)
    assert violations(broken)
    assert problems(broken)


NUMBERS = [
    (path, node)
    for path, node in walk(tree())
    if node.kind in ("integer", "decimal") and path.startswith("spec.") and "[]" not in path
]


@pytest.mark.parametrize(("path", "node"), NUMBERS, ids=[path for path, _ in NUMBERS])
def test_both_take_a_number_at_its_bounds_and_neither_takes_one_beyond(path: str, node: Node) -> None:
    for value, allowed in _at_bounds(node):
        changed = document(**_beside(path), **{path.removeprefix("spec.").replace(".", "__"): value})
        structural = [other for other in violations(changed) if other == path and _outside(changed, path)]
        assert bool(structural) is not allowed, (value, structural)
        told = [problem for problem in problems(changed) if problem.path == path and "must be" in problem.message]
        assert any(node.bounds.text() in problem.message for problem in told) is not allowed, (value, told)


def _beside(path: str) -> dict[str, Any]:
    """What the block that has the field must have as well: where blocks have types the first, and numbers that are required."""
    *blocks, name = path.split(".")
    node: Node = tree()
    for block in blocks:
        node = node.fields[block]
    others = {key: other for key, other in node.fields.items() if key != name and other.required}
    found: dict[str, Any] = {key: other.bounds.low for key, other in others.items() if other.kind == "integer"}
    kind = next((kind for kind, names in node.variants.items() if name in names), None)
    if kind is not None:
        found["type"] = kind
    return {"__".join((*blocks[1:], key)): value for key, value in found.items()}


def _outside(changed: Document, path: str) -> bool:
    """Whether the violation is of the field itself, not of a rule: a document with the field alone has no sound structure."""
    value: Any = changed
    for name in path.split("."):
        value = value[name]
    node: Node = tree()
    for name in path.split("."):
        node = node.fields[name]
    number, bounds = float(value), node.bounds
    low = bounds.low is not None and (number < bounds.low or (bounds.low_excluded and number == bounds.low))
    high = bounds.high is not None and (number > bounds.high or (bounds.high_excluded and number == bounds.high))
    return low or high


def _at_bounds(node: Node) -> Iterator[tuple[Any, bool]]:
    wire = int if node.kind == "integer" else str
    for bound, excluded, step in (
        (node.bounds.low, node.bounds.low_excluded, -1),
        (node.bounds.high, node.bounds.high_excluded, 1),
    ):
        if bound is not None:
            yield wire(bound), not excluded
            yield wire(bound + step), False
