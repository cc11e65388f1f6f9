"""Every run that the examples and the documentation show is one that the reader takes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from atelier_api.read import parse_run

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown() -> Iterator[tuple[str, str]]:
    """Name and text of each whole TrainingRun in the tree."""
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        if "kind: TrainingRun" in path.read_text():
            yield str(path.relative_to(ROOT)), path.read_text()
    for path in PAGES:
        for index, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)):
            if "kind: TrainingRun" in block:
                yield f"{path.relative_to(ROOT)}#{index}", block


RUNS = dict(shown())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_shown_is_valid(name: str) -> None:
    assert parse_run(RUNS[name], name).metadata.name


def test_the_demo_is_among_them() -> None:
    assert "examples/demo/run.yaml" in RUNS
    assert any(name.startswith("README.md") for name in RUNS)
