"""The list of fields is frozen: a field, kind or default that changes is seen in a review, not by a user."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from atelier_api.fields import MISSING, Bounds, Node, block_node, tree, walk
from atelier_api.layouts import LYCORIS
from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_api.v1alpha1.status import RunStatus

FOLDER = Path(__file__).parent
FROZEN = {
    "fields.txt": tree(),
    "status_fields.txt": block_node(RunStatus),
    "profile_fields.txt": block_node(TrainingProfileSpec),
}


def described(path: str, node: Node) -> str:
    """One line of the frozen list."""
    default = "required" if node.required else "" if node.default is MISSING else f"= {node.default!r}"
    if node.defaults:
        default = f"= {dict(node.defaults)!r}"
    return f"{path} {node.kind}{' or null' if node.nullable else ''} {default}".rstrip()


@pytest.mark.parametrize(("file", "root"), FROZEN.items(), ids=FROZEN)
def test_the_list_of_fields_is_the_frozen_one(file: str, root: Node) -> None:
    text = "".join(f"{described(path, node)}\n" for path, node in walk(root))
    assert (FOLDER / file).read_text() == text, (
        f"the API has changed; if that is meant, put this list into tests/api/{file}"
    )


@pytest.mark.parametrize("root", FROZEN.values(), ids=FROZEN)
def test_every_field_has_a_description_that_ends_a_sentence(root: Node) -> None:
    bare = [path for path, node in walk(root) if not path.endswith(("[]", "{}")) and not node.description.endswith(".")]
    assert bare == []


@pytest.mark.parametrize("root", [tree().fields["spec"], FROZEN["profile_fields.txt"]], ids=["run", "profile"])
def test_every_text_list_and_number_of_a_spec_is_bounded(root: Node) -> None:
    """Without a length the API server cannot tell what a CEL rule costs, and refuses the CRD."""
    unbounded = [
        path
        for path, node in walk(root)
        if (node.kind == "string" and not node.choices and node.length.high is None)
        or (node.kind == "list" and node.length.high is None)
        or (node.kind == "integer" and (node.bounds.low is None or node.bounds.high is None))
    ]
    assert unbounded == []


BOUNDS = {
    "none": (Bounds(), ""),
    "closed": (Bounds(1, 1024), "1–1024"),
    "below zero": (Bounds(-10, 10), "between -10 and 10"),
    "open below": (Bounds(0, 1, low_excluded=True), "more than 0 and at most 1"),
    "open above": (Bounds(0, 1, high_excluded=True), "at least 0 and less than 1"),
    "open": (Bounds(0, 1, low_excluded=True, high_excluded=True), "more than 0 and less than 1"),
    "from": (Bounds(low=5), "at least 5"),
    "above": (Bounds(low=5, low_excluded=True), "more than 5"),
    "up to": (Bounds(high=0.5), "at most 0.5"),
    "below": (Bounds(high=5, high_excluded=True), "less than 5"),
}


@pytest.mark.parametrize(("bounds", "text"), BOUNDS.values(), ids=BOUNDS)
def test_bounds_are_written_as_people_say_them(bounds: Bounds, text: str) -> None:
    assert bounds.text() == text


def test_a_variant_block_holds_the_fields_of_all_its_types() -> None:
    adapter = tree().fields["spec"].fields["adapter"]
    assert adapter.variants["full"] == ("type",)
    assert next(iter(adapter.fields)) == "type"
    assert adapter.fields["type"].choices == ("lora", *LYCORIS, "textual-inversion", "full", "controlnet")
    assert set(adapter.fields) == {name for names in adapter.variants.values() for name in names}


def test_a_field_of_several_types_has_the_default_of_each() -> None:
    adapter = tree().fields["spec"].fields["adapter"]
    assert adapter.fields["rank"].defaults == {"lora": 16, "lokr": 1024, "loha": 32, "locon": 64, "dylora": 128}
    assert adapter.fields["dora"].defaults == {}
    assert adapter.fields["dora"].default is False


def test_a_field_that_differs_between_types_in_more_than_its_default_is_refused() -> None:
    class One(Block):
        """One."""

        type: Literal["one"]
        size: int = Field(default=1, ge=1, description="Size.")

    class Other(Block):
        """Another."""

        type: Literal["other"]
        size: int = Field(default=2, ge=2, description="Size.")

    class Both(Block):
        either: One | Other = Field(discriminator="type", description="Either.")

    with pytest.raises(TypeError, match="the field size of one, other may differ in its default alone"):
        block_node(Both)


def test_a_float_that_is_no_decimal_is_refused() -> None:
    class Wrong(Block):
        size: float = Field(description="A float.")

    with pytest.raises(TypeError, match="must be a Decimal"):
        block_node(Wrong)


def test_a_type_the_api_does_not_have_is_refused() -> None:
    class Wrong(BaseModel):
        size: bytes

    with pytest.raises(KeyError):
        block_node(Wrong)
