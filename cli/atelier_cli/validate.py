"""`atelier validate`: every mistake of a file, without looking at the machine."""

from pathlib import Path
from typing import Annotated

import typer

from atelier_cli import terminal


def validate(files: Annotated[list[Path], typer.Argument(help="TrainingRun YAML files.")]) -> None:
    """Check files: every mistake, with its line. Exit code 64 when there is one."""
    from atelier_api.errors import ConfigError
    from atelier_api.read import read_run
    from atelier_api.rules import notes

    bad = False
    for file in files:
        try:
            run = read_run(file)
        except ConfigError as error:
            terminal.say_errors(str(error))
            bad = True
            continue
        terminal.say(f"{file}: ok")
        for note in notes(run):
            terminal.say(f"{file}: note: {note}")
    if bad:
        raise typer.Exit(int(ConfigError.exit_code))
