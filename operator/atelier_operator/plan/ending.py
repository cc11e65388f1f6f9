"""Why a child has failed: from all pods' terminal facts, else from the message of the Job or JobSet."""

import re
from dataclasses import dataclass

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.v1alpha1.conditions import Reason
from atelier_api.v1alpha1.status import AttemptStatus
from atelier_operator.exit_rules import RULES, Reaction
from atelier_operator.observed import Child, Pod, Workload

_CODE = re.compile(r"failed with exit code (\d+) matching")
_DISRUPTED = "has condition DisruptionTarget matching"
_FINAL_RULE = "FailJobSetFailurePolicyAction"  # reason of a JobSet that a rule of ours has failed

# A pod that lost its peers, was stopped or was killed may only show what another's failure did to it.
_CONSEQUENCES = (ExitCode.COLLECTIVE_TIMEOUT, ExitCode.STOPPED, None)


@dataclass(frozen=True)
class Ending:
    """The cause. `code` is None where no container could tell; `node` is that of the pod that decided."""

    reaction: Reaction
    reason: Reason
    message: str
    code: int | None = None
    node: str | None = None


def ending(child: Child, pods: tuple[Pod, ...], workload: Workload | None = None, noted: int | None = None) -> Ending:
    """The cause of a child's failure; `noted` is the exit code that was read from its pods before they went. What pods do
    while Kueue takes their quota back is Kueue's doing."""
    cause = of_pods(pods) or _of_noted(child, noted) or _of_message(child)
    taken_back = workload is not None and workload.evicted
    if taken_back and cause.reaction == "restart" and _known(cause.code) in _CONSEQUENCES:
        return Ending("restart-uncounted", Reason.PREEMPTED, f"stopped by Kueue: {cause.message}", cause.code)
    return cause


def of_pods(pods: tuple[Pod, ...]) -> Ending | None:
    """The cause that the pods of one life tell, if any has failed: the earliest of those that say most."""
    failed = [pod for pod in pods if pod.failed]
    if not failed:
        return None
    pod = min(failed, key=_order)
    code = _known(pod.exit_code)
    if pod.disrupted:
        return Ending("restart-uncounted", Reason.PREEMPTED, _evicted(pod), pod.exit_code, pod.node)
    if code is None:
        return Ending("restart", Reason.BACKEND_ERROR, _crashed(pod), pod.exit_code, pod.node)
    said = pod.result.message if pod.result and pod.result.exit_code == code else MEANINGS[code].text
    return Ending(RULES[code].reaction, _reason(pod, code), f"node {pod.index}: {said}", int(code), pod.node)


def of_loss(record: AttemptStatus) -> Ending:
    """The cause of a child's absence, by what its attempt's record says: we have deleted it for a gang that was broken, or somebody
    else has."""
    if record.reason == Reason.NODE_LOST:
        return Ending("restart-uncounted", Reason.NODE_LOST, record.message)
    if record.reason == Reason.GANG_TORN:
        return Ending("restart", Reason.GANG_TORN, record.message)
    return Ending("restart", Reason.DELETED, "the child object was deleted")


def _of_message(child: Child) -> Ending:
    """A Job's message names the code of one pod; a JobSet's names none."""
    if _DISRUPTED in child.message:
        return Ending("restart-uncounted", Reason.PREEMPTED, child.message)
    found = _CODE.search(child.message)
    code = _known(int(found[1])) if found else None
    if code is None:
        message = child.message or f"{child.backend} {child.name} has failed"
        reaction: Reaction = "fail" if child.reason == _FINAL_RULE else "restart"
        return Ending(reaction, Reason.BACKEND_ERROR, message, int(found[1]) if found else None)
    return _of_code(code)


def _of_noted(child: Child, number: int | None) -> Ending | None:
    """The cause by a code that was noted, unless it is an earlier life's: that one did not end the JobSet."""
    code = _known(number)
    if code is None or (child.reason == _FINAL_RULE and RULES[code].by_jobset):
        return None
    return _of_code(code)


def _of_code(code: ExitCode) -> Ending:
    return Ending(RULES[code].reaction, Reason(MEANINGS[code].reason), MEANINGS[code].text, int(code))


def _order(pod: Pod) -> tuple[bool, float]:
    explains = pod.disrupted or pod.exit_reason == "OOMKilled" or _known(pod.exit_code) not in _CONSEQUENCES
    time = pod.result.time if pod.result else pod.finished.timestamp() if pod.finished else float("inf")
    return not explains, time


def _known(number: int | None) -> ExitCode | None:
    try:
        code = ExitCode(number or 0)
    except ValueError:
        return None
    return code if code in RULES else None


def _reason(pod: Pod, code: ExitCode) -> Reason:
    """The agent may know more than its code, such as a deadline; a reason that nobody knows is not passed on."""
    if pod.result and pod.result.exit_code == code and pod.result.reason in set(Reason):
        return Reason(pod.result.reason)
    return Reason(MEANINGS[code].reason)


def _crashed(pod: Pod) -> str:
    where = f"pod {pod.name} on node {pod.node}"
    if pod.exit_reason == "OOMKilled":
        return f"{where} was killed for want of memory; give the profile's pods more (spec.resources.memory)"
    if pod.exit_code is None:
        return f"{where} has failed: {pod.failure or 'the node does not say why'}"
    return f"{where} exited with {pod.exit_code}"


def _evicted(pod: Pod) -> str:
    said = pod.result.message if pod.result else pod.failure
    return f"pod {pod.name} was evicted from node {pod.node}" + (f": {said}" if said else "")
