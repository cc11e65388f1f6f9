"""`atelier run`: train on this machine, and tell how it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    file: Annotated[Path, typer.Argument(help="TrainingRun YAML file.")],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew: the run's checkpoints, samples and history are removed first.")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: PATH=VALUE.", metavar="PATH=VALUE")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    launch_module: Annotated[str, typer.Option(hidden=True)] = "atelier_runtime.launch",
) -> None:
    """Train on this machine. Run the same file again to go on; Ctrl-C stops with a checkpoint, twice kills."""
    from atelier_cli.machine import host, surroundings
    from atelier_cli.prefetching import ensure_model
    from atelier_cli.run_source import load
    from atelier_cli.session import Session
    from atelier_operator.planner.local import check_flavour_fits, check_places, local_machine, resolve_local

    loaded = load(file, changes or [])
    around = surroundings(file)
    machine = local_machine(loaded.spec, host())
    check_places(loaded.spec, around)
    check_flavour_fits(loaded, machine=machine, around=around)
    ensure_model(loaded.spec, around, quiet=quiet)
    run_file = resolve_local(loaded, machine=machine, around=around)
    code = Session(run_file, file, quiet=quiet, launch_module=launch_module).run(fresh=fresh)
    if code:
        raise typer.Exit(code)
