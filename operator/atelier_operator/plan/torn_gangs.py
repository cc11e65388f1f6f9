"""A gang one of whose pods has been replaced while the others went on.

Ranks never wait for peers of another life: where a pod alone comes anew (somebody has removed the old one with its finalizers), the
others would hang in a collective until its timeout, and the new one at the rendezvous. The whole gang starts anew instead.
"""

from collections.abc import Iterable
from datetime import timedelta

from atelier_api.v1alpha1.conditions import Condition, ConditionType
from atelier_operator.observed import Pod
from atelier_operator.times import parse_time

MARGIN = timedelta(seconds=30)
"""The clocks of the operator and of the API server may differ by so much."""


def replaced(pods: Iterable[Pod], conditions: Iterable[Condition]) -> Pod | None:
    """The pod that came after all pods of its life had been given nodes, while others of them are still there."""
    scheduled = next(
        (each for each in conditions if each.type == ConditionType.SCHEDULED and each.status == "True"), None
    )
    since = parse_time(scheduled.last_transition_time) if scheduled else None
    if since is None:
        return None
    live = [(pod, pod.created) for pod in pods if pod.created is not None and not (pod.ended or pod.deleting)]
    late = [pod for pod, created in live if created > since + MARGIN]
    return late[0] if late and len(late) < len(live) else None


def told(pod: Pod) -> str:
    """What has happened, for people."""
    return f"pod {pod.name} was replaced while its peers went on; the whole gang starts anew"
