"""A script as `python SCRIPT ARGUMENTS` runs it, but in a fork that has imported the runtime: for scripts whose imports cost most."""

import runpy
import sys
from pathlib import Path

from processes import run_ranks


def run_script(script: Path, *arguments: str, timeout: float = 300) -> str:
    """What ended the script: "" for its end, else what it gave to `sys.exit`. Raises AssertionError for any other exception."""
    [ended] = run_ranks(1, "forked_script:live", str(script), *arguments, timeout=timeout)
    return str(ended)


def live(script: str, *arguments: str) -> str:
    """The script's life, in the fork."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return "" if end.code in (None, 0) else str(end.code)
    return ""
