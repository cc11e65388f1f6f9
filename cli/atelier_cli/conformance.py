"""`atelier models --proved`: what the tests have shown of each family, as `make conformance` has written it down."""

from collections.abc import Mapping, Sequence

from atelier_api.families import FAMILIES
from atelier_api.families.conformance import CELLS, NOT_APPLICABLE, PROVED, table
from atelier_api.families.promised import tally
from atelier_cli import terminal

GAP = 2
"""Columns of the window between two of a table."""
UNTRIED = ""
"""What is known of a cell that came after `make conformance` was run."""


def show(families: Sequence[str]) -> None:
    """The table of these families, the reasons of cells without a proof, and the tally where all are shown."""
    values = {family: {cell: table().get(family, {}).get(cell, UNTRIED) for cell in CELLS} for family in families}
    for cells in blocks(list(CELLS), max(map(len, ("FAMILY", *families))), terminal.console().width):
        rows = [(family, *(_mark(row[cell]) for cell in cells)) for family, row in values.items()]
        terminal.table(("FAMILY", *(cell.upper() for cell in cells)), rows)
        terminal.say()
    for (cell, reason), without in _reasons(values).items():
        whose = f": {', '.join(without)}" if len(families) > 1 else ""
        terminal.say(f"{cell} – {reason}{whose}")
    if len(families) == len(FAMILIES):
        terminal.say()
        terminal.say(tally())


def blocks(cells: Sequence[str], first: int, width: int) -> list[list[str]]:
    """The cells by the tables that they are shown in, below each other: as many columns of each as `width` has room for.

    `first` is the width of the families' column, which each table has. A window too narrow for a column has one in each table.
    """
    result: list[list[str]] = [[]]
    left = width - first
    for cell in cells:
        if result[-1] and left < GAP + len(cell):
            result.append([])
            left = width - first
        result[-1].append(cell)
        left -= GAP + len(cell)
    return result


def _mark(value: str) -> str:
    return {PROVED: "✓", UNTRIED: "?"}.get(value, "–")


def _reasons(values: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str], list[str]]:
    """By cell and reason, the families of which it is not proved."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in CELLS:
        for family, row in values.items():
            if row[cell] != PROVED:
                reason = row[cell].removeprefix(NOT_APPLICABLE) or "not tried yet"
                found.setdefault((cell, reason), []).append(family)
    return found
