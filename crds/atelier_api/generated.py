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


def main(*files: Generated) -> None:
    """The command line of a generator: writes the files, or with `--check` exits with 1 when one is not up to date."""
    names = ", ".join(file.path.name for file in files)
    parser = argparse.ArgumentParser(description=f"Generate {names} from the types.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is not up to date")
    if not parser.parse_args().check:
        for file in files:
            file.write()
        return
    stale = {file.path: difference for file in files if (difference := file.difference())}
    if stale:
        for difference in stale.values():
            sys.stderr.write("\n".join(islice(difference, MOST_LINES_SHOWN)) + "\n")
        sys.exit(f"{', '.join(map(str, stale))} is not what the types say; run `make crds`")
