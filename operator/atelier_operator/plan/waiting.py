"""Why a child does not train yet: quota, then nodes, then images. What is said of a live child that has not begun."""

import re
from datetime import UTC, datetime
from fractions import Fraction

from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_api.v1alpha1.status import QueueStatus
from atelier_operator.observed import Child, Observed, Pod, Quota, Workload
from atelier_operator.plan.conditions import Said

# Kueue 0.12 has no reasons for these, only messages.
_TOO_LARGE = re.compile(r"request > maximum capacity")
_NO_QUEUE = re.compile(r"(LocalQueue|ClusterQueue) \S+ (doesn't exist|is inactive|is stopped)")
_STUCK = {
    **dict.fromkeys(
        ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"),
        Reason.IMAGE_PULL,
    ),
    # A Secret or ConfigMap that the pod names is not there.
    **dict.fromkeys(("CreateContainerConfigError", "CreateContainerError"), Reason.CONTAINER_NOT_CREATED),
}
_FAR = datetime.max.replace(tzinfo=UTC)


def queue_status(child: Child, seen: Observed) -> QueueStatus | None:
    """Where the run waits, and its place there."""
    if child.queue is None:
        return None
    workload = seen.workload
    if workload is None:
        return QueueStatus(name=child.queue)
    position = None if workload.reserved else _position(workload, seen.waiting)
    return QueueStatus(name=child.queue, workload=workload.name, position=position, admitted_at=workload.admitted_at)


def say_admission(child: Child, seen: Observed, said: Said) -> bool:
    """Say whether the child has quota; True when it has, or needs none."""
    kind = ConditionType.ADMITTED
    if child.queue is None:
        said.say(kind, "True", Reason.NOT_QUEUED, "the attempt was made without a Kueue queue, nothing is waited for")
        return True
    workload = seen.workload
    if workload is None:
        if child.suspended:
            said.say(kind, "False", Reason.PENDING, f"Kueue has not looked at {child.name} yet")
            return False
        said.say(kind, "True", Reason.QUOTA_RESERVED)
        return True
    if workload.admitted and not child.suspended:
        said.say(kind, "True", Reason.QUOTA_RESERVED, f"quota of queue {child.queue} is reserved")
        return True
    said.say(kind, "False", *_why(workload, child.queue, _position(workload, seen.waiting)))
    return False


def _why(workload: Workload, queue: str, position: int) -> tuple[Reason, str]:
    message = workload.message
    if workload.evicted:
        return Reason.PREEMPTED, f"stopped by Kueue ({workload.evicted}), waiting for quota again: {message}"
    if _NO_QUEUE.search(message):
        return Reason.NO_QUEUE, f"queue {queue} cannot be used: {message}"
    if _TOO_LARGE.search(message):
        return Reason.EXCEEDS_MAX_QUOTA, f"larger than the queue's quota can ever be: {message}"
    if workload.reserved:
        return Reason.PENDING, f"quota of queue {queue} is reserved, the start is near"
    place = f"place {position} in queue {queue}"
    return Reason.WAITING_FOR_QUOTA, f"{place}: {message}" if message else place


def _position(workload: Workload, waiting: tuple[Workload, ...]) -> int:
    """1 is next: higher priority first, then the older one."""
    order = sorted(waiting, key=lambda each: (-each.priority, each.created or _FAR, each.name))
    names = [each.name for each in order]
    return names.index(workload.name) + 1 if workload.name in names else len(names) + 1


def say_scheduling(pods: tuple[Pod, ...], nodes: int, said: Said) -> bool:
    """Say whether all pods have a node and their images; True when all run."""
    kind = ConditionType.SCHEDULED
    bound = sum(pod.node is not None for pod in pods)
    text = f"{bound} of {nodes} pods have a node"
    homeless = next((pod for pod in pods if pod.unschedulable), None)
    if homeless is not None:
        said.say(kind, "False", Reason.UNSCHEDULABLE, f"{text}: {homeless.unschedulable}")
        return False
    if bound < nodes:
        said.say(kind, "False", Reason.GANG_PENDING, text)
        return False
    stuck = next((pod for pod in pods if pod.waiting in _STUCK), None)
    if stuck is not None:
        said.say(kind, "False", _STUCK[stuck.waiting], f"pod {stuck.name}: {stuck.waiting}: {stuck.waiting_message}")
        return False
    said.say(kind, "True", Reason.BOUND, text)
    return all(pod.running or pod.ended for pod in pods)


def lacking_quota(needed: dict[str, str], quotas: tuple[Quota, ...]) -> str | None:
    """Why the whole gang does not go into the namespace's ResourceQuotas; None when it does.

    Asked before anything is created: pod by pod, two gangs could take half of the quota each and wait for ever. A quota with
    scopes is left to the API server.
    """
    for quota in (each for each in quotas if not each.scoped):
        for resource, amount in needed.items():
            for name in (f"requests.{resource}", resource):
                if name not in quota.hard:
                    continue
                free = quantity(quota.hard[name]) - quantity(quota.used.get(name, "0"))
                if quantity(amount) > quantity(quota.hard[name]):
                    return f"{name}: needs {amount}, ResourceQuota {quota.name} allows {quota.hard[name]} at most"
                if quantity(amount) > free:
                    left = f"{_plain(free)} of {quota.hard[name]} left"
                    return f"{name}: needs {amount}, ResourceQuota {quota.name} has {left}"
    return None


_SUFFIXES = {
    **{"n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000)},
    **{suffix: Fraction(1000**power) for power, suffix in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{f"{suffix}i": Fraction(1024**power) for power, suffix in enumerate(("K", "M", "G", "T", "P", "E"), 1)},
}


def quantity(text: str) -> Fraction:
    """The number in a quantity of the API: 500m, 4, 80Gi, 1e3."""
    for length in (2, 1):
        if text[-length:] in _SUFFIXES and text[:-length]:
            return Fraction(text[:-length]) * _SUFFIXES[text[-length:]]
    return Fraction(text)


def times(text: str, factor: int) -> str:
    """A quantity, multiplied: 8Gi, 4 -> 32Gi."""
    number = text.rstrip("numkKMGTPEi")
    return _plain(Fraction(number) * factor) + text[len(number) :]


def _plain(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"{float(number):g}"
