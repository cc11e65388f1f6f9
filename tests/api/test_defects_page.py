"""docs/reference/defects.md names tests that exist, and one for every defect."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "reference" / "defects.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "| area |" not in line]
NAMED = sorted({tuple(name) for name in re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)})


@cache
def names_in(file: str) -> set[str]:
    """Names of the test functions that pytest finds in a file below `tests/`."""
    tree = ast.parse((TESTS / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in functions if name.startswith("test_")}


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_the_page_names_exists(file: str, name: str) -> None:
    assert name in names_in(file)


def test_every_defect_has_an_area_and_a_test() -> None:
    assert len(ROWS) > 110
    for row in ROWS:
        assert len(row) == 3, row
        assert re.fullmatch(r"(`[\w/]+\.py::test_\w+`(, )?)+", row[2]), row
