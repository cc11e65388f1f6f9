"""`atelier models --proved`: the table of what is proved, in a window and in a pipe."""

import os
import pty
import subprocess
import sys
from collections.abc import Mapping

import pytest
from typer.testing import CliRunner

from atelier_api.families import FAMILIES, NAMES
from atelier_api.families.conformance import CELLS, NOT_APPLICABLE, PROVED, table
from atelier_api.families.promised import tally
from atelier_cli import conformance
from atelier_cli.main import app

MARKS = {True: "✓", False: "–"}


def shown(*arguments: str) -> list[str]:
    """Lines in a pipe."""
    result = CliRunner().invoke(app, ["models", "--proved", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.splitlines()


def reset(monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Mapping[str, str]]) -> None:
    """A table in which all is proved but for these cells of these families."""
    proved = dict.fromkeys(CELLS, PROVED)
    made = {family: proved | changes.get(family, {}) for family in NAMES}
    monkeypatch.setattr(conformance, "table", lambda: made)


def test_in_a_pipe_a_family_is_one_line_with_a_mark_for_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    reset(monkeypatch, {"flux": {"lora": f"{NOT_APPLICABLE}for a reason"}})
    heading, *rows = shown()[: len(FAMILIES) + 1]
    assert heading.split() == ["FAMILY", *(cell.upper() for cell in CELLS)]
    for family, row in zip(FAMILIES, rows, strict=True):
        assert row.split() == [family, *(MARKS[(family, cell) != ("flux", "lora")] for cell in CELLS)]


def test_a_reason_is_told_once_with_the_families_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = {"lora": f"{NOT_APPLICABLE}for a reason", "full": f"{NOT_APPLICABLE}for a reason"}
    reset(monkeypatch, {"flux": reason, "sdxl": reason, "wan": {"lora": f"{NOT_APPLICABLE}for another"}})
    told = [line for line in shown() if " – " in line and not line.startswith(NAMES)]
    assert told == [
        "lora – for a reason: flux, sdxl",
        "lora – for another: wan",
        "full – for a reason: flux, sdxl",
    ]


def test_a_cell_that_was_not_tried_is_no_proof_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "table", lambda: {"flux": {"lora": PROVED}})
    lines = shown("flux")
    marks = dict(zip(CELLS, lines[1].split()[1:], strict=True))
    assert marks == {cell: "✓" if cell == "lora" else "?" for cell in CELLS}
    assert "full – not tried yet" in lines


def test_the_last_line_is_the_tally_of_what_is_written_down() -> None:
    assert shown()[-1] == tally()
    values = [row.get(cell) for row in table().values() for cell in CELLS]
    assert shown()[-1].startswith(f"{values.count(PROVED)} of {len(NAMES) * len(CELLS)} cells")


def test_one_family_has_its_own_row_and_no_tally(monkeypatch: pytest.MonkeyPatch) -> None:
    reset(monkeypatch, {"flux": {"lora": f"{NOT_APPLICABLE}for a reason"}})
    lines = shown("flux")
    assert lines[1].split()[0] == "flux"
    assert lines[2:] == ["", "lora – for a reason"]


def test_an_unknown_family_names_the_nearest() -> None:
    result = CliRunner().invoke(app, ["models", "sdx", "--proved"])
    assert result.exit_code == 64
    assert "there is no family sdx; did you mean sdxl?" in result.stderr


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (100, [["lora", "recompute", "bf16"]]),
        (27, [["lora", "recompute", "bf16"]]),
        (26, [["lora", "recompute"], ["bf16"]]),
        (20, [["lora"], ["recompute"], ["bf16"]]),
        (1, [["lora"], ["recompute"], ["bf16"]]),
    ],
)
def test_columns_that_have_no_room_go_into_a_table_below(width: int, expected: list[list[str]]) -> None:
    assert conformance.blocks(["lora", "recompute", "bf16"], first=4, width=width) == expected


def test_in_a_window_no_row_of_the_table_is_wrapped() -> None:
    """80 columns wide, in which the table takes several blocks."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", "from atelier_cli.main import app; app(['models', '--proved'])"]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environment) as process:
        os.close(follower)
        text = read_all(leader)
        assert process.wait() == 0, process.stderr and process.stderr.read()
    lines = text.splitlines()
    rows = [line.split() for line in lines if line.startswith(("FAMILY ", *(f"{name} " for name in NAMES)))]
    headings = [row[1:] for row in rows if row[0] == "FAMILY"]
    assert len(headings) > 1
    assert [cell.lower() for heading in headings for cell in heading] == list(CELLS)
    assert [row[0] for row in rows] == ["FAMILY", *NAMES] * len(headings)
    assert max(len(line.rstrip()) for line in lines if line.startswith("FAMILY ")) <= 80


def read_all(descriptor: int) -> str:
    """What a program writes to its terminal until it ends, after which reading fails on Linux and gives nothing elsewhere."""
    parts = []
    try:
        while part := os.read(descriptor, 65536):
            parts.append(part)
    except OSError:
        pass
    os.close(descriptor)
    return b"".join(parts).decode()
