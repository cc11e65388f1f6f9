"""A plugin of pytest that keeps what the tests have shown of each model family, for `atelier models` and the families' pages.

A test that is marked `cell("recompute")` and is run for each family, or for each tiny pipeline, fills that cell of the table. A cell
is proved when each of its tests has passed and at least one was not skipped. `--record-conformance` writes the table to
crds/atelier_api/families/conformance.json; it needs a run that has tried every cell.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from atelier_api.families import NAMES, FamilyFacts
from atelier_api.families.conformance import CELLS, NOT_APPLICABLE, PATH, PROVED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-conformance", action="store_true", help="write what the cells of the model families show"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-conformance") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(), "conformance-record")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Says with each test what it fills, since reports do not know marks."""
    for item in items:
        for mark in item.iter_markers("cell"):
            family = family_of(getattr(item, "callspec", None))
            assert mark.args[0] in CELLS, f"{item.nodeid}: no such cell"
            assert family is not None, f"{item.nodeid} fills a cell and is run for no family"
            item.user_properties.append(("cell", (family, mark.args[0])))


def family_of(callspec: Any) -> str | None:
    """The family that a parameter names: by itself, by a tiny pipeline, or as the first word of a way of training.

    Of a parameter that is a tuple, its first value counts.
    """
    from family_models import FAMILY_OF  # the plugin is there for tests without torch as well

    for parameter in () if callspec is None else callspec.params.values():
        value = parameter[0] if isinstance(parameter, tuple) and parameter else parameter
        if isinstance(value, FamilyFacts):
            return value.name
        name = value.partition(" ")[0] if isinstance(value, str) else None
        if name in FAMILY_OF or name in NAMES:
            return FAMILY_OF.get(name, name)
    return None


class Record:
    """Outcomes by cell, of all workers."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        self.reasons: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name != "cell":
                continue
            family, cell = value
            key = (str(family), str(cell))
            if report.skipped and isinstance(report.longrepr, tuple):
                self.reasons[key] = report.longrepr[2].removeprefix("Skipped: ")
            if report.failed or report.when == "call" or report.skipped:
                self.outcomes[key][report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        missing = [f"{family} {cell}" for family in NAMES for cell in CELLS if (family, cell) not in self.outcomes]
        failed = {node for nodes in self.outcomes.values() for node, how in nodes.items() if how == "failed"}
        if missing or failed:
            first = f", such as {missing[0]}" if missing else ""
            raise pytest.UsageError(
                f"nothing is recorded: {len(failed)} tests failed, {len(missing)} cells not tried{first}"
            )
        document = {family: dict(self._row(family)) for family in NAMES}
        PATH.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def _row(self, family: str) -> Iterator[tuple[str, str]]:
        for cell in CELLS:
            passed = [how for how in self.outcomes[family, cell].values() if how == "passed"]
            yield cell, PROVED if passed else f"{NOT_APPLICABLE}{self.reasons[family, cell]}"
