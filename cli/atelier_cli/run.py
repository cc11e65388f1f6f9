"""`atelier run`: train on this machine, or on a cluster, and tell how it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from atelier_cli import terminal


def run(
    file: Annotated[Path, typer.Argument(help="TrainingRun YAML file.")],
    on: Annotated[
        Literal["machine", "cluster"],
        typer.Option("--on", help="Where: this machine, or the cluster of the kubeconfig, as `submit --follow`."),
    ] = "machine",
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="On this machine: start anew; the run's checkpoints, samples and history are removed first.",
        ),
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field: PATH=VALUE.", metavar="PATH=VALUE")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="On a cluster: namespace. Default: the file's.")
    ] = None,
    context: Annotated[str | None, typer.Option("--context", help="On a cluster: context of the kubeconfig.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    launch_module: Annotated[str, typer.Option(hidden=True)] = "atelier_runtime.rank",
) -> None:
    """Train. Run the same file again to go on; Ctrl-C stops with a checkpoint, twice kills (on a cluster it only leaves)."""
    from atelier_api.errors import ConfigError

    if on == "cluster":
        from atelier_cli.cluster_commands import submit_run

        if fresh:
            raise ConfigError(
                "--fresh is for this machine; on a cluster delete the run and submit it again, or give it another metadata.name"
            )
        submit_run(file, namespace=namespace, context=context, changes=changes, follow=True, quiet=quiet)
        return
    for option, value in (("--namespace", namespace), ("--context", context)):
        if value is not None:
            raise ConfigError(f"{option} is for a cluster; add --on cluster")
    _run_here(file, changes or [], fresh=fresh, quiet=quiet, launch_module=launch_module)


def _run_here(file: Path, changes: list[str], *, fresh: bool, quiet: bool, launch_module: str) -> None:
    from atelier_cli.cluster_fields import ignored_here
    from atelier_cli.machine import host, surroundings
    from atelier_cli.prefetching import ensure_model
    from atelier_cli.run_source import load
    from atelier_cli.session import Session
    from atelier_operator.planner.local import check_flavour_fits, check_places, local_machine, resolve_local

    loaded = load(file, changes)
    if not quiet:
        for line in ignored_here(loaded):
            terminal.say(f"note: {line}")
    around = surroundings(file)
    machine = local_machine(loaded.spec, host())
    check_places(loaded.spec, around)
    check_flavour_fits(loaded, machine=machine, around=around)
    ensure_model(loaded.spec, around, quiet=quiet)
    run_file = resolve_local(loaded, machine=machine, around=around)
    code = Session(run_file, file, quiet=quiet, launch_module=launch_module).run(fresh=fresh)
    if code:
        raise typer.Exit(code)
