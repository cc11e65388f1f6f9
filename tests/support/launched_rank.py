"""One rank of a run, as a process of `run_ranks` trains it. Imports nothing but the runtime: every rank pays for it."""

import sys

from atelier_api.exit_codes import ExitCode
from atelier_runtime import launch


def train(run_file: str) -> None:
    """What `python -m atelier_runtime.rank --run-file …` does. It ends the process when the rank fails."""
    sys.argv = ["launch", "--run-file", run_file]
    assert launch.main() == ExitCode.DONE
