"""`atelier install-check`: what a cluster has and lacks for runs, said before somebody waits for a run in vain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from atelier_cli import terminal
from atelier_cli.cluster_commands import Context, Namespace

if TYPE_CHECKING:
    from atelier_cli.cluster_api import ClusterApi

LEASE = "atelier-operator"
LEASE_SECONDS = 60
VERBS = ("create", "get", "list", "patch", "delete")


@dataclass(frozen=True)
class Finding:
    """One line. `missing` fails the check; `optional` only says what will not be there."""

    verdict: Literal["ok", "optional", "missing"]
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
    yield _operator(api)
    yield from _profiles(api)
    if api.serves("jobset.x-k8s.io", "v1alpha2", "jobsets"):
        yield Finding("ok", "JobSet", "gangs are restarted together, also while the operator is down")
    else:
        yield Finding("optional", "JobSet", "not installed: runs become Indexed Jobs, which the operator restarts")
    if api.serves("kueue.x-k8s.io", "v1beta1", "localqueues"):
        yield _queues(api, namespace)
    else:
        yield Finding("optional", "Kueue", "not installed: no queues, no preemption; a ResourceQuota is respected")
    denied = [verb for verb in VERBS if not api.may(verb, namespace)]
    if denied:
        yield Finding("missing", "rights", f"you may not {', '.join(denied)} trainingruns in namespace {namespace}")
    else:
        yield Finding("ok", "rights", f"you may work with trainingruns in namespace {namespace}")


def _operator(api: ClusterApi) -> Finding:
    leases = api.leases(LEASE)
    if not leases:
        return Finding("missing", "operator", f"no Lease {LEASE} in any namespace: it has never run")
    renewed = max(lease.spec.renew_time for lease in leases if lease.spec.renew_time)
    age = (datetime.now(UTC) - renewed).total_seconds()
    if age > LEASE_SECONDS:
        return Finding("missing", "operator", f"it last renewed its Lease {terminal.duration(age)} ago; is it down?")
    return Finding("ok", "operator", f"it renewed its Lease {terminal.duration(max(0, age))} ago")


def _profiles(api: ClusterApi) -> Iterator[Finding]:
    profiles = api.objects("atelier.dev", "v1alpha1", "clustertrainingprofiles")
    profiles += api.objects("atelier.dev", "v1alpha1", "trainingprofiles")
    if not profiles:
        yield Finding("missing", "profiles", "there is none: runs need one, with the image of their pods")
        return
    names = [profile["metadata"]["name"] for profile in profiles]
    default = "" if "default" in names else "; none is called default, so runs must name one"
    yield Finding("ok", "profiles", ", ".join(names) + default)
    resources = {
        gpu.get("resource", "nvidia.com/gpu") for each in profiles for gpu in each["spec"].get("gpuClasses", ())
    }
    if not resources:
        yield Finding("optional", "GPUs", "no profile has gpuClasses: runs train on the CPU")
        return
    for resource in sorted(resources):
        amounts = [int((node.status.allocatable or {}).get(resource, 0)) for node in api.nodes()]
        if sum(amounts):
            have = sum(bool(amount) for amount in amounts)
            yield Finding("ok", "GPUs", f"{sum(amounts)} {resource} on {have} nodes")
        else:
            yield Finding("missing", "GPUs", f"no node has {resource}; is its device plugin installed?")


def _queues(api: ClusterApi, namespace: str) -> Finding:
    queues = api.objects("kueue.x-k8s.io", "v1beta1", "localqueues")
    own = [queue["metadata"]["name"] for queue in queues if queue["metadata"]["namespace"] == namespace]
    if not own:
        return Finding("optional", "Kueue", f"installed, but namespace {namespace} has no LocalQueue")
    return Finding("ok", "Kueue", f"queues of namespace {namespace}: {', '.join(own)}")
