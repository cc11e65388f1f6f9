"""`atelier submit | status | logs | stop | resume | delete`: runs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atelier_cli import terminal

if TYPE_CHECKING:
    from atelier_cli.cluster_api import ClusterApi

Name = Annotated[str, typer.Argument(help="Name of the run.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace. Default: that of the kubeconfig's context.")
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig. Default: the present one.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a field: PATH=VALUE.", metavar="PATH=VALUE")]


def submit(
    file: Annotated[Path, typer.Argument(help="TrainingRun YAML file.")],
    namespace: Namespace = None,
    context: Context = None,
    changes: Changes = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and show how it goes until it ends.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Give a run to a cluster, or change one that is there. Checked first as `atelier validate` does."""
    submit_run(file, namespace=namespace, context=context, changes=changes, follow=follow, quiet=quiet)


def submit_run(
    file: Path, *, namespace: str | None, context: str | None, changes: list[str] | None, follow: bool, quiet: bool
) -> None:
    """Give the run to the cluster, and follow it where asked."""
    from atelier_cli.run_source import load

    run = load(file, changes or [])
    api = _api(context)
    named = "namespace" in run.metadata.model_fields_set
    chosen = namespace or (run.metadata.namespace if named else api.namespace)
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"namespace": chosen})})
    api.apply(run)
    name = run.metadata.name
    if not quiet:
        terminal.say(f"run {name} is in namespace {chosen}; see it with `atelier status {name} -n {chosen}`")
    if follow:
        from atelier_cli.cluster_follow import follow as follow_run

        code = follow_run(api, chosen, name, quiet=quiet)
        if code:
            raise typer.Exit(code)


def status(
    name: Annotated[str | None, typer.Argument(help="Name of a run. Default: all of them.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Runs of all namespaces.")] = False,
) -> None:
    """Show the runs of a cluster, or one of them with everything that is known of it."""
    api = _api(context)
    chosen = namespace or api.namespace
    if name is not None:
        _show(api.run(chosen, name))
        return
    found = api.runs(None if everywhere else chosen)
    if not found:
        terminal.say("no runs" if everywhere else f"no runs in namespace {chosen}")
        return
    headings = [*(["namespace"] if everywhere else []), "name", "phase", "step", "loss", "left", "queue", "restarts"]
    rows = [([run["metadata"]["namespace"]] if everywhere else []) + _row(run) for run in found]
    terminal.table(headings, rows)


def logs(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    node: Annotated[int, typer.Option("--node", help="Number of the node.", min=0)] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", help="Only so many lines from the end.", min=1)] = None,
) -> None:
    """Print what a node of a run has logged, of its newest attempt."""
    from atelier_api.errors import ConfigError

    api = _api(context)
    chosen = namespace or api.namespace
    pods = api.pods(chosen, name)
    if not pods:
        store = (api.run(chosen, name).get("status") or {}).get("storeUri")
        where = f"; what earlier ones have logged is in {store}/logs" if store else ""
        raise ConfigError(f"run {name} has no pods now{where}")
    index = "batch.kubernetes.io/job-completion-index"
    pod = next((each for each in pods if int((each.metadata.annotations or {}).get(index, 0)) == node), None)
    if pod is None:
        raise ConfigError(f"--node is {node}; run {name} has the nodes 0 to {len({p.metadata.name for p in pods}) - 1}")
    for line in api.log(chosen, pod.metadata.name, follow=follow, lines=tail):
        terminal.say(line)


def stop(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Stop a run with a checkpoint and give its GPUs back. `atelier resume` goes on from there."""
    api = _api(context)
    api.suspend(namespace or api.namespace, name, True)
    terminal.say(f"run {name} is being stopped, with a checkpoint; `atelier resume {name}` goes on from there")


def resume(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Let a stopped run go on from its newest checkpoint."""
    api = _api(context)
    api.suspend(namespace or api.namespace, name, False)
    terminal.say(f"run {name} goes on as soon as there is room")


def delete(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run and its pods. Checkpoints, samples and results stay in the store."""
    api = _api(context)
    chosen = namespace or api.namespace
    run = api.run(chosen, name)
    phase = (run.get("status") or {}).get("phase", "Pending")
    if not yes and phase not in ("Succeeded", "Failed"):
        typer.confirm(f"run {name} is {phase}; delete it?", abort=True)
    api.delete(chosen, name)
    store = (run.get("status") or {}).get("storeUri")
    terminal.say(f"run {name} is deleted" + (f"; what it made stays in {store}" if store else ""))


def _api(context: str | None) -> ClusterApi:
    from atelier_cli.cluster_api import ClusterApi

    return ClusterApi(context)


def _row(run: dict[str, Any]) -> list[str]:
    said = run.get("status") or {}
    progress = said.get("progress") or {}
    left = progress.get("etaSeconds")
    queue = said.get("queue") or {}
    place = f" ({queue['position']})" if queue.get("position") else ""
    return [
        run["metadata"]["name"],
        said.get("phase", "Pending"),
        f"{progress['step']}/{progress['totalSteps']}" if progress else "",
        progress.get("loss", ""),
        terminal.duration(left) if left and said.get("phase") == "Running" else "",
        f"{queue['name']}{place}" if queue else "",
        str((said.get("restarts") or {}).get("counted", 0)),
    ]


def _show(run: dict[str, Any]) -> None:
    """Everything about one run."""
    said, name = run.get("status") or {}, run["metadata"]["name"]
    plan, progress, checkpoint = (said.get(key) or {} for key in ("plan", "progress", "checkpoint"))
    terminal.say(name, style="bold")
    rows = [("phase", f"{said.get('phase', 'Pending')}: {said.get('message', '')}".rstrip(": "))]
    if progress:
        rows.append(("progress", f"{progress['stage']}, step {progress['step']} of {progress['totalSteps']}"))
    if plan:
        fits = f", {terminal.size(plan['predictedPeakMemoryBytes'])} predicted"
        rows.append(("plan", f"{plan['strategy']} on {plan['worldSize']} processes as {plan['backend']}{fits}"))
    if said.get("queue"):
        rows.append(("queue", said["queue"]["name"]))
    if checkpoint:
        rows.append(("checkpoint", f"step {checkpoint['step']}, {terminal.size(checkpoint['sizeBytes'])}"))
    if said.get("storeUri"):
        rows.append(("store", said["storeUri"]))
    terminal.facts(rows)
    if said.get("conditions"):
        terminal.say()
        conditions = [
            [each["type"], each["status"], each["reason"], each.get("message", "")] for each in said["conditions"]
        ]
        terminal.table(["condition", "status", "reason", "message"], conditions)
    if len(said.get("attempts") or ()) > 1 or (said.get("attempts") and said["attempts"][-1].get("reason")):
        terminal.say()
        attempts = [
            [str(each["number"]), each["start"], each.get("end", ""), each.get("reason", ""), each.get("message", "")]
            for each in said["attempts"]
        ]
        terminal.table(["attempt", "start", "end", "reason", "message"], attempts)
