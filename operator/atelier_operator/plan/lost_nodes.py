"""Pods on nodes that do not answer any more.

Nobody but the kubelet ends a pod. Where it is dead, a pod that is to go stays for ever, its Job counts it neither as failed nor as
gone, and the run waits for nothing. So its pods there are removed by force, once their grace is long over and the cluster itself
has given the node up, and the whole gang starts anew elsewhere.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from atelier_operator.observed import Observed, Pod
from atelier_operator.plan.outcome import Event, Plan, Ref

PATIENCE = timedelta(seconds=30)
"""So long after the end of its grace a pod is taken to be stuck."""

LOOK_AGAIN_SECONDS = 30.0


def stuck(seen: Observed, now: datetime) -> tuple[Pod, ...]:
    """Pods that should have been gone long ago: their nodes are to be asked for."""
    return tuple(pod for pod in seen.pods if pod.node and pod.gone_by is not None and pod.gone_by + PATIENCE <= now)


def lost(seen: Observed, now: datetime) -> tuple[Pod, ...]:
    """Those of them whose nodes the cluster has given up."""
    return tuple(pod for pod in stuck(seen, now) if pod.node in seen.lost_nodes)


def told(pod: Pod) -> str:
    """What has become of a pod, for people."""
    return f"node {pod.node} does not answer; its pod {pod.name} was removed by force"


def without_lost(decided: Plan, namespace: str, seen: Observed, now: datetime) -> Plan:
    """The plan, which also removes lost pods and looks again at those that should go."""
    gone = lost(seen, now)
    waits = [
        (pod.gone_by + PATIENCE - now).total_seconds() for pod in seen.pods if pod.node and pod.gone_by is not None
    ]
    if not waits:
        return decided
    after = max(LOOK_AGAIN_SECONDS if min(waits) <= 0 else min(waits), 1.0)
    return replace(
        decided,
        delete=(*(Ref("Pod", namespace, pod.name, pod.uid) for pod in gone), *decided.delete),
        events=(*decided.events, *(Event("Warning", "NodeLost", told(pod)) for pod in gone)),
        requeue_seconds=min(after, after if decided.requeue_seconds is None else decided.requeue_seconds),
    )
