"""`atelier report`: where the report of a run lies, and what opens it."""

from pathlib import Path
from typing import Annotated

import typer

from atelier_cli import terminal

REPORT = "report.html"


def report(
    run: Annotated[Path, typer.Argument(help="The run's YAML file, or its folder in a local store.")],
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Print the path of a run's report; one in S3 is fetched first."""
    path = _in_folder(run) if run.is_dir() else _of_file(run)
    terminal.say(str(path))
    if open_:
        typer.launch(path.as_uri())


def _in_folder(folder: Path) -> Path:
    from atelier_api.errors import DataError

    path = (folder / REPORT).absolute()
    if not path.exists():
        raise DataError(f"{folder} has no {REPORT}; a run writes it when it is done or stopped")
    return path


def _of_file(file: Path) -> Path:
    from atelier_api.errors import DataError
    from atelier_cli.machine import surroundings
    from atelier_cli.places import scratch_folder, store_uri
    from atelier_cli.run_source import load
    from atelier_runtime.store import ObjectMissing, open_store

    loaded, around = load(file), surroundings(file)
    uri = store_uri(loaded, around)
    if not uri.startswith("s3://"):
        return _in_folder(Path(uri))
    target = scratch_folder(loaded, around) / REPORT
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        open_store(uri, loaded.spec.storage.s3).get_file(REPORT, target)
    except ObjectMissing:
        raise DataError(f"{uri} has no {REPORT}; a run writes it when it is done or stopped") from None
    return target
