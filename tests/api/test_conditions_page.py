"""The page of conditions names every condition, reason and phase that there is, and no other condition or phase."""

import re
from pathlib import Path
from typing import get_args

from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_api.v1alpha1.status import Phase

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "conditions.md").read_text()


def first_column(heading: str) -> set[str]:
    """Words of the first column of the table below a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]
    return {word for cell in cells for word in cell.split(", ")}


def test_every_condition_and_phase_has_its_line() -> None:
    assert first_column("Conditions") == set(ConditionType)
    assert first_column("Phases") == set(get_args(Phase))


def test_every_reason_is_named() -> None:
    last = set(re.findall(r"\w+", PAGE.split("| those of the [exit codes]")[1]))
    assert set(Reason) - first_column("Reasons") - last == set()
    assert first_column("Reasons") <= set(Reason)
