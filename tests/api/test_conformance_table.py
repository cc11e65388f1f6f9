"""The table of what is proved of each family."""

from atelier_api.families import NAMES
from atelier_api.families.conformance import CELLS, PROVED, table


def test_there_is_a_row_for_each_family_with_every_cell() -> None:
    """A family that was added, or a cell, asks for `make conformance`."""
    assert {family: list(row) for family, row in table().items()} == {family: list(CELLS) for family in NAMES}


def test_a_cell_is_proved_or_says_why_it_is_not_applicable() -> None:
    for family, row in table().items():
        for cell, value in row.items():
            prefix, _, reason = value.partition("not applicable: ")
            assert value == PROVED or (not prefix and reason), f"{family} {cell}: {value}"
