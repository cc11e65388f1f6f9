"""A plugin of pytest that tells where the time of a run of the tests went: `--times`.

Seconds of all workers together, set-up and tear-down included, by file and by model family. The suite has a limit
(`make test`: 20 minutes on two cores, once its cluster is built), so what takes long must be where most is found.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from atelier_api.families import NAMES
from conformance import family_of

_FILES, _FAMILIES_IN_A_LINE = 40, 6


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", action="store_true", help="print the seconds that each file and each model family took")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--times") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Times(), "suite-times")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Says with each test whose it is, since reports do not know parameters."""
    for item in items:
        family = family_of(getattr(item, "callspec", None)) or _named_by(item.path)
        if family is not None:
            item.user_properties.append(("family", family))


def _named_by(file: Path) -> str | None:
    name = file.stem.removeprefix("test_")
    return name if name in NAMES else None


class Times:
    """Seconds by file and by family, of all workers."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.families: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.files[report.nodeid.partition("::")[0]] += report.duration
        for name, value in report.user_properties:
            if name == "family":
                self.families[str(value)] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        total = sum(self.files.values())
        terminalreporter.section(f"{total:.0f} seconds of all workers")
        for file, seconds in self.files.most_common(_FILES):
            terminalreporter.write_line(f"{seconds:7.1f} s {seconds / total:4.0%}  {file}")
        others = total - sum(self.families.values())
        terminalreporter.write_line(f"\nby family ({others:.0f} s are of no family alone)")
        for line in _lines(self.families):
            terminalreporter.write_line(line)


def _lines(families: Mapping[str, float]) -> list[str]:
    cells = [f"{name} {seconds:.0f}" for name, seconds in Counter(families).most_common()]
    return ["  ".join(cells[at : at + _FAMILIES_IN_A_LINE]) for at in range(0, len(cells), _FAMILIES_IN_A_LINE)]
