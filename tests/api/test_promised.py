"""The matrix to match: that each promise is proved, but for those that are listed as open, and what is proved beyond it."""

from collections import Counter
from dataclasses import dataclass

import pytest

from atelier_api.families import FAMILIES, NAMES
from atelier_api.families.conformance import CELLS, PROVED, table
from atelier_api.families.promised import FEATURES, INSTEAD, MATRIX, kept, matrix_cells, tally
from atelier_api.quantizations import QUANTIZATIONS


@dataclass(frozen=True)
class Open:
    """Promises of one feature that are not proved yet, and why. A model is taken off with its proof, the whole entry with the last."""

    feature: str
    reason: str
    models: tuple[str, ...]


OPEN = (
    Open(
        "TwinFlow",
        "its time enters through a network of its own, of which a second one would be a copy (`unhurried` in the facts)",
        ("Chroma 1",),
    ),
)
OPEN_CELLS = {(model, each.feature) for each in OPEN for model in each.models}
PROMISED = [(row.model, feature) for row, feature in matrix_cells(promised=True)]
BEYOND = 15
"""Cells without a promise that are proved at least."""


def proved(*, promised: bool) -> set[tuple[str, str]]:
    """Those cells of the matrix, as (model, feature), that are proved."""
    return {(row.model, feature) for row, feature in matrix_cells(promised=promised) if kept(row, feature)}


def test_the_matrix_has_28_models_and_266_promises_in_308_cells() -> None:
    assert len(MATRIX) == len({row.model for row in MATRIX}) == 28
    assert len(FEATURES) == 11
    assert all(set(row.marks) <= {"✓", "✗"} for row in MATRIX)
    assert len(PROMISED) == 266
    assert len(list(matrix_cells(promised=False))) == 42


def test_the_features_without_a_promise_are_as_many_as_in_each_column_of_the_matrix() -> None:
    columns = Counter(feature for _, feature in matrix_cells(promised=False))
    assert columns == {
        "PEFT LoRA": 2,
        "LyCORIS": 1,
        "quantization": 4,
        "flow shift": 4,
        "TwinFlow": 5,
        "LayerSync": 5,
        "ControlNet": 21,
    }


def test_each_family_trains_one_model_of_the_matrix_but_for_one_that_it_does_not_have() -> None:
    trained = Counter(family for row in MATRIX for family in row.families)
    assert set(trained.values()) == {1}
    assert set(NAMES) - set(trained) == {"sd15"}


def test_every_cell_that_shows_a_feature_is_tried_or_the_feature_is_open() -> None:
    unknown = {feature for feature, cells in FEATURES.items() if not set(cells) <= set(CELLS)}
    assert unknown <= {each.feature for each in OPEN}
    assert all(set(cells) <= set(CELLS) for cells in INSTEAD.values())


@pytest.mark.parametrize("feature", FEATURES)
def test_every_promise_is_proved_but_for_the_open_ones(feature: str) -> None:
    expected = {cell for cell in PROMISED if cell[1] == feature} - OPEN_CELLS
    assert expected - proved(promised=True) == set()


def test_what_is_open_is_promised_and_not_proved() -> None:
    """A proof takes its cell off the list."""
    assert OPEN_CELLS - set(PROMISED) == set()
    assert OPEN_CELLS & proved(promised=True) == set()
    assert sum(len(each.models) for each in OPEN) == len(OPEN_CELLS)
    assert all(each.reason and each.models for each in OPEN)


def test_some_of_what_nobody_promises_is_proved_nonetheless() -> None:
    assert len(proved(promised=False)) >= BEYOND


def test_where_quantisation_is_promised_each_kind_is_allowed() -> None:
    for row, feature in matrix_cells(promised=True):
        if feature == "quantization":
            assert all(FAMILIES[family].quantizations == QUANTIZATIONS for family in row.families), row.model


def test_the_tally_counts_the_cells_and_the_promises() -> None:
    values = [row.get(cell) for row in table().values() for cell in CELLS]
    text = tally()
    assert text.startswith(
        f"{values.count(PROVED)} of {len(NAMES) * len(CELLS)} cells of {len(NAMES)} families are proved"
    )
    assert f"promise, {len(proved(promised=True))} of 266 are proved" in text
    assert text.endswith(f"of what they do not, {len(proved(promised=False))} of 42.")
