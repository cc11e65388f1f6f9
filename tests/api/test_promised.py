"""The matrix to match: that each promise is proved, and what is proved beyond it."""

from collections import Counter

import pytest

from atelier_api.families import FAMILIES, NAMES
from atelier_api.families.conformance import CELLS, PROVED, table
from atelier_api.families.promised import FEATURES, INSTEAD, MATRIX, kept, matrix_cells, tally
from atelier_api.quantizations import QUANTIZATIONS

PROMISED = [(row.model, feature) for row, feature in matrix_cells(promised=True)]
BEYOND = 16
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


def test_every_cell_that_shows_a_feature_is_tried() -> None:
    assert all(set(cells) <= set(CELLS) for cells in [*FEATURES.values(), *INSTEAD.values()])


@pytest.mark.parametrize("feature", FEATURES)
def test_every_promise_is_proved(feature: str) -> None:
    assert {cell for cell in PROMISED if cell[1] == feature} - proved(promised=True) == set()


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
