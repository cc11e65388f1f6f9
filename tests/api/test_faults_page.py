"""docs/reference/faults.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reference" / "faults.md"


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`((?:e2e|operator|helm|api)/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(named) > 40
    for file, name in named:
        text = (TESTS / file).read_text()
        assert not name or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file} has no {name}"


def test_every_row_says_what_proves_it() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 3, row
        assert "test" in cells[2] or cells[2] == "there is one version only", row
