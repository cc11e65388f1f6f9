"""Files that are generated from the types: writing them, and checking that they are up to date."""

import argparse
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

MOST_LINES_SHOWN = 40


@dataclass(frozen=True)
class Generated:
    """A file and the function that makes its text."""

    path: Path
    text: Callable[[], str]

    def difference(self) -> list[str]:
        """What would change, as a unified diff; empty when the file is up to date."""
        now = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = difflib.unified_diff(
            now.splitlines(), self.text().splitlines(), str(self.path), "generated", lineterm=""
        )
        return list(lines)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text(), encoding="utf-8")


def main(file: Generated) -> None:
    """The command line of a generator: writes the file, or with `--check` exits with 1 when it is not up to date."""
    parser = argparse.ArgumentParser(description=f"Generate {file.path.name} from the types.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 when the file is not up to date"
    )
    if not parser.parse_args().check:
        file.write()
        return
    difference = file.difference()
    if difference:
        sys.stderr.write("\n".join(islice(difference, MOST_LINES_SHOWN)) + "\n")
        sys.exit(f"{file.path} is not what the types say; run `make crds`")
