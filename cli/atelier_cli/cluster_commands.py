"""`atelier submit | status | logs | stop | resume | delete`: runs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atelier_cli import terminal

if TYPE_CHECKING:
    from atelier_api.v1alpha1 import TrainingRun
    from atelier_cli.cluster_api import ClusterApi

Name = Annotated[str, typer.Argument(help="Name of the run.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace. Default: that of the kubeconfig's context.")
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig. Default: the present one.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a field: PATH=VALUE.", metavar="PATH=VALUE")]

ENDED = ("Succeeded", "Failed")
NOT_SEEN = "no operator has looked at it yet; `atelier install-check` says whether one runs"


def submit(
    file: Annotated[Path, typer.Argument(help="TrainingRun YAML file.")],
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace. Default: the file's, else the context's.")
    ] = None,
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
    named = namespace_of(run, namespace)
    api = _api(context)
    chosen, name = named or api.namespace, run.metadata.name
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"namespace": chosen})})
    made = api.apply(run)
    if not quiet:
        terminal.say(f"run {name} is in namespace {chosen}; see it with `atelier status {name} -n {chosen}`")
        if suspended(made):
            terminal.say(f"it is stopped (spec.schedule.suspend); `atelier resume {name} -n {chosen}` lets it go on")
    if follow:
        from atelier_cli.cluster_follow import follow as follow_run

        code = follow_run(api, chosen, name, quiet=quiet)
        if code:
            raise typer.Exit(code)


def namespace_of(run: TrainingRun, wanted: str | None) -> str | None:
    """The namespace that the option or the file names; None: neither does. Raises ConfigError when they differ."""
    from atelier_api.errors import ConfigError

    named = run.metadata.namespace if "namespace" in run.metadata.model_fields_set else None
    if wanted is not None and named not in (None, wanted):
        raise ConfigError(f"--namespace is {wanted}, metadata.namespace of the file is {named}; leave one of them out")
    return wanted or named


def status(
    name: Annotated[str | None, typer.Argument(help="Name of a run. Default: all of them.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Runs of all namespaces.")] = False,
) -> None:
    """Show the runs of a cluster, or one of them with everything that is known of it."""
    from atelier_api.errors import ConfigError

    if everywhere and (name is not None or namespace is not None):
        raise ConfigError("--all-namespaces lists runs of all namespaces; leave out the name and --namespace")
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
    rows = [([run["metadata"]["namespace"]] if everywhere else []) + row(run) for run in found]
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
    from atelier_cli.cluster_api import index_of

    api = _api(context)
    chosen = namespace or api.namespace
    pods = {index_of(pod): pod for pod in api.pods(chosen, name)}
    if not pods:
        said = api.run(chosen, name).get("status") or {}
        where = f"; what earlier ones have logged is in {said['storeUri']}/logs" if said.get("attempts") else ""
        raise ConfigError(f"run {name} has no pods now, it is {said.get('phase', 'Pending')}{where}")
    if node not in pods:
        raise ConfigError(f"--node is {node}; run {name} has pods of the nodes {', '.join(map(str, pods))}")
    for line in api.log(chosen, pods[node], follow=follow, lines=tail):
        typer.echo(line)  # as it is: a log may hold what a console would take for its own


def stop(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Stop a run with a checkpoint and give its GPUs back. `atelier resume` goes on from there."""
    api = _api(context)
    chosen = namespace or api.namespace
    run = api.run(chosen, name)
    _must_not_have_ended(run, "stop")
    if suspended(run):
        terminal.say(f"run {name} is stopped already; `atelier resume {name} -n {chosen}` lets it go on")
        return
    api.suspend(chosen, name, True)
    terminal.say(f"run {name} is being stopped, with a checkpoint; `atelier resume {name} -n {chosen}` lets it go on")


def resume(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Let a stopped run go on from its newest checkpoint."""
    api = _api(context)
    chosen = namespace or api.namespace
    run = api.run(chosen, name)
    _must_not_have_ended(run, "resume")
    if not suspended(run):
        said = run.get("status") or {}
        terminal.say(
            f"run {name} has not been stopped; it is {said.get('phase', 'Pending')}: {said.get('message', '')}"
        )
        return
    api.suspend(chosen, name, False)
    terminal.say(f"run {name} goes on as soon as there is room")


def delete(
    name: Name,
    namespace: Namespace = None,
    context: Context = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run and its pods, after asking. Checkpoints, samples and results stay in the store."""
    api = _api(context)
    chosen = namespace or api.namespace
    run = api.run(chosen, name)
    said = run.get("status") or {}
    if not yes:
        typer.confirm(f"run {name} in namespace {chosen} is {said.get('phase', 'Pending')}; delete it?", abort=True)
    api.delete(chosen, name)
    store = said.get("storeUri")
    terminal.say(f"run {name} is deleted" + (f"; what it made stays in {store}" if store else ""))


def _api(context: str | None) -> ClusterApi:
    from atelier_cli.cluster_api import ClusterApi

    return ClusterApi(context)


def suspended(run: dict[str, Any]) -> bool:
    """Whether somebody has asked for the run to be stopped."""
    return bool((run["spec"].get("schedule") or {}).get("suspend"))


def _must_not_have_ended(run: dict[str, Any], verb: str) -> None:
    from atelier_api.errors import ConfigError

    phase, name = (run.get("status") or {}).get("phase"), run["metadata"]["name"]
    if phase in ENDED:
        raise ConfigError(f"run {name} has {phase.lower()}; there is nothing to {verb}")


def row(run: dict[str, Any]) -> list[str]:
    """A run in the table of all runs."""
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


def facts_of(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of one run, one fact a line."""
    said = run.get("status") or {}
    plan, progress, checkpoint, restarts = (
        said.get(key) or {} for key in ("plan", "progress", "checkpoint", "restarts")
    )
    rows = [("phase", f"{said.get('phase', 'Pending')}: {said.get('message') or NOT_SEEN}")]
    if progress:
        loss = f", loss {progress['loss']}" if "loss" in progress else ""
        rows.append(("progress", f"{progress['stage']}, step {progress['step']} of {progress['totalSteps']}{loss}"))
    if plan:
        fits = f", {terminal.size(plan['predictedPeakMemoryBytes'])} a process predicted"
        rows.append(("plan", f"{plan['strategy']}, {plan['worldSize']} processes, as {plan['backend']}{fits}"))
    if said.get("queue"):
        rows.append(("queue", said["queue"]["name"]))
    if checkpoint:
        rows.append(("checkpoint", f"step {checkpoint['step']}, {terminal.size(checkpoint['sizeBytes'])}"))
    counted, uncounted = restarts.get("counted", 0), restarts.get("uncounted", 0)
    if counted or uncounted:
        rows.append(("restarts", f"{counted} counted, {uncounted} that do not count"))
    if said.get("cost"):
        rows.append(("cost", _cost(said["cost"])))
    if said.get("excludedNodes"):
        rows.append(("avoids", ", ".join(said["excludedNodes"])))
    for each in said.get("artifacts") or ():
        rows.append((each["format"], f"{each['uri']}, {terminal.size(each['sizeBytes'])}"))
    if said.get("storeUri"):
        rows.append(("store", said["storeUri"]))
    return rows


def _cost(cost: dict[str, Any]) -> str:
    """GPU hours, and money where the profile has prices."""
    text = f"{cost['gpuSeconds'] / 3600:.2f} GPU hours"
    if "spent" not in cost:
        return text
    text += f", {float(cost['spent']):.2f} {cost['currency']}"
    return text + (
        f" of about {float(cost['expected']):.2f}" if cost.get("expected", cost["spent"]) != cost["spent"] else ""
    )


def _show(run: dict[str, Any]) -> None:
    """Everything about one run."""
    said = run.get("status") or {}
    terminal.say(f"{run['metadata']['name']} in namespace {run['metadata']['namespace']}", style="bold")
    terminal.facts(facts_of(run))
    if said.get("conditions"):
        terminal.say()
        conditions = [
            [each["type"], each["status"], each["reason"], each.get("message", "")] for each in said["conditions"]
        ]
        terminal.table(["condition", "status", "reason", "message"], conditions)
    attempts = said.get("attempts") or ()
    if len(attempts) > 1 or any(each.get("reason") for each in attempts):
        terminal.say()
        rows = [
            [str(each["number"]), each["start"], each.get("end", ""), each.get("reason", ""), each.get("message", "")]
            for each in attempts
        ]
        terminal.table(["attempt", "start", "end", "reason", "message"], rows)
