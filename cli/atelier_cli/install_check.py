"""`atelier install-check`: what a cluster has and lacks for runs, said before somebody waits for a run in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from atelier_cli import terminal
from atelier_cli.cluster_commands import Context, Namespace

if TYPE_CHECKING:
    from atelier_cli.cluster_api import ClusterApi

LEASE_LABEL = "app.kubernetes.io/name=atelier"
"""Set by the operator on the Lease that it makes, whatever the release is called."""

LEASE_SECONDS = 60
VERBS = ("create", "get", "list", "patch", "delete")


@dataclass(frozen=True)
class Finding:
    """One line. `missing` fails the check; `optional` only says what will not be there; `unknown`: the user may not look."""

    verdict: Literal["ok", "optional", "missing", "unknown"]
    what: str
    text: str


def install_check(
    namespace: Namespace = None,
    context: Context = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is missing.")] = False,
) -> None:
    """Say what a cluster lacks to run Atelier. Exit code 1 when runs cannot work there."""
    from atelier_cli.cluster_api import ClusterApi

    api = ClusterApi(context)
    found = list(findings(api, namespace or api.namespace))
    shown = [each for each in found if not quiet or each.verdict == "missing"]
    if shown:
        terminal.table(["", "what", ""], [[each.verdict, each.what, each.text] for each in shown])
    if any(each.verdict == "missing" for each in found):
        raise typer.Exit(1)


def findings(api: ClusterApi, namespace: str) -> Iterator[Finding]:
    """Everything that is looked at, most important first."""
    if not api.serves("atelier.dev", "v1alpha1", "trainingruns"):
        yield Finding("missing", "TrainingRun", "the kind is not installed; install the chart helm/atelier")
        return
    yield Finding("ok", "TrainingRun", "the kind is installed")
    yield from _looked("operator", "Leases of all namespaces", lambda: [operator(api.leases(LEASE_LABEL))])
    yield from _profiles(api, namespace)
    if api.serves("jobset.x-k8s.io", "v1alpha2", "jobsets"):
        yield Finding("ok", "JobSet", "gangs are restarted together, also while the operator is down")
    else:
        yield Finding("optional", "JobSet", "not installed: runs become Indexed Jobs, which the operator restarts")
    if api.serves("kueue.x-k8s.io", "v1beta1", "localqueues"):
        yield from _looked("Kueue", "LocalQueues", lambda: [_queues(api, namespace)])
    else:
        yield Finding("optional", "Kueue", "not installed: no queues, no preemption; a ResourceQuota is respected")
    denied = [verb for verb in VERBS if not api.may(verb, namespace)]
    if denied:
        yield Finding("missing", "rights", f"you may not {', '.join(denied)} trainingruns in namespace {namespace}")
    else:
        yield Finding("ok", "rights", f"you may work with trainingruns in namespace {namespace}")


def _looked(what: str, at: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What is found, or that this user may not look: an artist's rights end at the namespace."""
    from atelier_cli.cluster_api import NotAllowed

    try:
        yield from list(look())
    except NotAllowed:
        yield Finding("unknown", what, f"you may not list {at}; ask the administrator")


def operator(leases: list[Any]) -> Finding:
    """Whether an operator is at work, by the Leases that operators have made."""
    held = [lease.spec.renew_time for lease in leases if lease.spec.holder_identity and lease.spec.renew_time]
    if not leases:
        return Finding("missing", "operator", "no namespace has its Lease: it has never run")
    if not held:
        return Finding("missing", "operator", "it has let go of its Lease: it was stopped")
    age = (datetime.now(UTC) - max(held)).total_seconds()
    if age > LEASE_SECONDS:
        return Finding("missing", "operator", f"it last renewed its Lease {terminal.duration(age)} ago; is it down?")
    return Finding("ok", "operator", f"it renewed its Lease {terminal.duration(max(0, age))} ago")


def _profiles(api: ClusterApi, namespace: str) -> Iterator[Finding]:
    """Profiles, and GPUs where all profiles could be seen."""
    found: list[dict[str, Any]] = []

    def look(plural: str, where: str | None) -> Callable[[], list[Finding]]:
        def add() -> list[Finding]:
            found.extend(api.objects("atelier.dev", "v1alpha1", plural, where))
            return []

        return add

    unseen = [
        *_looked("profiles", "ClusterTrainingProfiles", look("clustertrainingprofiles", None)),
        *_looked("profiles", "TrainingProfiles", look("trainingprofiles", namespace)),
    ]
    yield from unseen
    if found or not unseen:
        yield profiles(found)
    if found:
        yield from _looked("GPUs", "nodes", lambda: gpus(found, api.nodes()))


def profiles(found: list[dict[str, Any]]) -> Finding:
    """Whether runs have a profile, and one that they get without naming it."""
    if not found:
        return Finding("missing", "profiles", "there is none: runs need one, with the image of their pods")
    cluster = {each["metadata"]["name"] for each in found if not each["metadata"].get("namespace")}
    default = "" if "default" in cluster else "; no ClusterTrainingProfile is called default: runs must name one"
    names = [each["metadata"]["name"] for each in found]
    return Finding("ok", "profiles", ", ".join(dict.fromkeys(names)) + default)


def gpus(found: list[dict[str, Any]], nodes: list[Any]) -> list[Finding]:
    """Whether the nodes have what the profiles promise."""
    resources = {
        gpu.get("resource", "nvidia.com/gpu") for each in found for gpu in each["spec"].get("gpuClasses") or ()
    }
    if not resources:
        return [Finding("optional", "GPUs", "no profile has gpuClasses: runs train on the CPU")]
    result = []
    for resource in sorted(resources):
        amounts = [int((node.status.allocatable or {}).get(resource, 0)) for node in nodes]
        if sum(amounts):
            have = sum(bool(amount) for amount in amounts)
            result.append(Finding("ok", "GPUs", f"{sum(amounts)} {resource} on {have} nodes"))
        else:
            result.append(Finding("missing", "GPUs", f"no node has {resource}; is its device plugin installed?"))
    return result


def _queues(api: ClusterApi, namespace: str) -> Finding:
    queues = api.objects("kueue.x-k8s.io", "v1beta1", "localqueues", namespace)
    if not queues:
        return Finding("optional", "Kueue", f"installed, but namespace {namespace} has no LocalQueue")
    names = ", ".join(queue["metadata"]["name"] for queue in queues)
    return Finding("ok", "Kueue", f"queues of namespace {namespace}: {names}")
