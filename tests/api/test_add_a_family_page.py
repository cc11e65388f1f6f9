"""docs/how-to/add-a-family.md shows the files of its example as they are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "add-a-family.md").read_text()
SHOWN = re.findall(r"^`([\w/]+\.py)`[^\n]*:\n\n```python\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
COUNTED = re.findall(r"^\| `([\w/]+/\w*sd15\.py)` \| (\d+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("file", "text"), SHOWN, ids=[file for file, _ in SHOWN])
def test_the_example_is_the_real_file(file: str, text: str) -> None:
    assert text in (ROOT / file).read_text()


def test_the_example_has_its_three_files_and_their_lengths() -> None:
    assert len(SHOWN) == 3
    assert len(COUNTED) == 4
    for file, lines in COUNTED:
        assert len((ROOT / file).read_text().splitlines()) == int(lines), file
