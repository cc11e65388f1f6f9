"""The life of a run, decided anew in each pass from what is there: accept, start, watch, restart, suspend, end, clean up."""

from datetime import datetime

from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_operator.exit_rules import MOST_UNCOUNTED
from atelier_operator.observed import Child, Observed, Pod, Run
from atelier_operator.plan import attempts, live, torn_gangs
from atelier_operator.plan.acceptance import Accepted, Refused, accept
from atelier_operator.plan.adoption import adopt
from atelier_operator.plan.again import LOSSES, after_failure, after_loss, start_next
from atelier_operator.plan.cost import Rate
from atelier_operator.plan.deadlines import after_the_end, overdue
from atelier_operator.plan.draft import Draft
from atelier_operator.plan.ending import ending, of_pods
from atelier_operator.plan.lost_nodes import lost, told, without_lost
from atelier_operator.plan.outcome import Plan
from atelier_operator.planner.cluster import gpu_class

LATEST_FACTS_SECONDS = 10.0
"""Watches of different kinds are not in step: a child can be seen to have failed before its pods are seen to have ended."""


def plan(run: Run, seen: Observed, now: datetime) -> Plan:
    """What is to be done for the run now."""
    return without_lost(_decided(run, seen, now), run.namespace, seen, now)


def _decided(run: Run, seen: Observed, now: datetime) -> Plan:
    if run.deleting:
        return Plan(run.status)
    if run.terminal:
        return after_the_end(run, now)
    draft = Draft(run, seen, now)
    accepted = accept(run, seen)
    _say_accepted(draft, accepted)
    if isinstance(accepted, Accepted):
        draft.rate = _rate(accepted)
    child = seen.child(attempts.present(run.status, seen))
    if child is not None:
        _with_child(draft, child, accepted)
    elif isinstance(accepted, Refused):
        _refuse(draft, accepted)
    else:
        _without_child(draft, accepted)
    return draft.done()


def _rate(accepted: Accepted) -> Rate:
    spec, profile = accepted.run.spec, accepted.profile
    gpu = gpu_class(spec, profile)
    if gpu is None:
        return Rate(0)
    return Rate(spec.parallelism.nodes * spec.parallelism.gpus_per_node, gpu.price_per_hour, profile.currency)


def _say_accepted(draft: Draft, accepted: Accepted | Refused) -> None:
    if isinstance(accepted, Refused):
        if accepted.kind is ConditionType.FITS:
            draft.said.say(ConditionType.ACCEPTED, "True", Reason.VALID)
        draft.said.say(accepted.kind, "False", accepted.reason, accepted.message)
        return
    if accepted.drift:
        changed = ", ".join(accepted.drift)
        message = (
            f"{changed} changed after the start, which is ignored: the run goes on as it was started; make a new run"
        )
        draft.said.say(ConditionType.ACCEPTED, "True", Reason.SPEC_DRIFT, message)
    else:
        draft.said.say(ConditionType.ACCEPTED, "True", Reason.VALID)
    if accepted.run_file.plan.device_memory_bytes is None:
        draft.said.say(ConditionType.FITS, "Unknown", Reason.UNKNOWN, "the memory of the device is not known")
    else:
        draft.said.say(ConditionType.FITS, "True", Reason.PREDICTED)


def _refuse(draft: Draft, refused: Refused) -> None:
    """No new attempt. A run that has been started does not go back to Pending: its spec would be free to change again."""
    if draft.before.attempt == 0:
        draft.phase("Pending", refused.reason, refused.message)
    elif draft.suspend:
        _suspended(draft)
    else:
        draft.said.say(ConditionType.RUNNING, "False", refused.reason, refused.message)
        draft.phase("Recovering", refused.reason, f"the next attempt cannot be made: {refused.message}")


def _without_child(draft: Draft, accepted: Accepted) -> None:
    """None was made yet, we have stopped it, or somebody has deleted it."""
    reason = draft.records[-1].reason if draft.records else None
    vanished = attempts.is_open(draft.records) and reason != attempts.SUSPENDED
    if draft.suspend:
        _suspended(draft)
    elif vanished or reason in LOSSES:
        after_loss(draft, accepted)
    else:
        draft.close_attempt(attempts.SUSPENDED, attempts.STOPPED_ON_REQUEST)
        start_next(draft, accepted)


def _suspended(draft: Draft) -> None:
    draft.close_attempt(attempts.SUSPENDED, attempts.STOPPED_ON_REQUEST)
    message = "spec.schedule.suspend is true; set it to false to go on"
    draft.said.say(ConditionType.SUSPENDED, "True", Reason.REQUESTED, message)
    for kind in (ConditionType.ADMITTED, ConditionType.SCHEDULED, ConditionType.RUNNING):
        draft.said.say(kind, "False", Reason.REQUESTED)
    draft.fields["queue"] = None
    draft.phase("Suspended", Reason.REQUESTED, message)


def _with_child(draft: Draft, child: Child, accepted: Accepted | Refused) -> None:
    """Tell what a child does, and react to its end. A spec that is refused by now ends no attempt that is under way."""
    progress = draft.seen.progress
    if child.attempt != draft.before.attempt:
        adopt(draft, child, accepted)
    pods = draft.seen.pods_of(child.attempt)
    draft.records = attempts.recorded(draft.records, child, progress.step if progress else None, of_pods(pods))
    live.report(draft)
    if child.finished == "Completed":
        _completed(draft, child, accepted, pods)
    elif child.finished and draft.suspend:
        _suspended(draft)
    elif draft.suspend or child.deleting:
        _stop(draft, child, pods)
    elif child.finished:
        _failed(draft, child, accepted, pods)
    elif gone := [pod for pod in lost(draft.seen, draft.now) if pod in pods]:
        _anew(draft, child, Reason.NODE_LOST, told(gone[0]))
    elif late := torn_gangs.replaced(pods, draft.before.conditions):
        _anew(draft, child, Reason.GANG_TORN, torn_gangs.told(late))
    elif draft.uncounted > MOST_UNCOUNTED:
        draft.remove(child)
        draft.fail(Reason.MAX_RESTARTS, f"restarted {draft.uncounted} times, which is more than {MOST_UNCOUNTED}")
    else:
        live.tell(draft, child, pods)
        if isinstance(accepted, Accepted):
            overdue(draft, accepted, child.attempt)


def _completed(draft: Draft, child: Child, accepted: Accepted | Refused, pods: tuple[Pod, ...]) -> None:
    """All steps are done; where the spec asks for more by now, another attempt goes on."""
    if isinstance(accepted, Accepted) and 0 < child.steps < accepted.run.spec.hyperparameters.steps:
        draft.close_attempt(Reason.COMPLETED, f"{child.steps} steps done")
        if draft.suspend:
            _suspended(draft)
        else:
            start_next(draft, accepted)
        return
    progress = draft.fields.get("progress") or draft.before.progress
    if progress is not None:
        total = progress.total_steps or child.steps  # before it trains a run tells of no steps
        done = {
            "stage": "Succeeded",
            "detail": "",
            "step": total,
            "total_steps": total,
            "percent": 100,
            "eta_seconds": 0,
        }
        draft.fields["progress"] = progress.model_copy(update=done)
    live.report_artifacts(draft, pods)
    draft.succeed()


def _stop(draft: Draft, child: Child, pods: tuple[Pod, ...]) -> None:
    """Delete the child; the next attempt goes on from the checkpoint that its pods commit. Should the user change his mind
    before it is gone, the record still tells that it was he who had it stopped."""
    draft.remove(child)
    left = sum(not pod.ended for pod in pods)
    message = f"{left} pods are committing a checkpoint" if left else "stopping"
    draft.said.say(ConditionType.RUNNING, "False", Reason.STOPPING)
    if draft.suspend:
        draft.records = attempts.marked(draft.records, attempts.SUSPENDED, attempts.STOPPED_ON_REQUEST)
        draft.said.say(ConditionType.SUSPENDED, "False", Reason.STOPPING, message)
    draft.phase("Suspended" if draft.suspend else "Recovering", Reason.STOPPING, message)


def _anew(draft: Draft, child: Child, reason: Reason, message: str) -> None:
    """The gang is broken, and its Job will never notice. The record tells, once the child is gone, what another attempt is for."""
    draft.remove(child)
    draft.records = attempts.marked(draft.records, reason, message)
    draft.said.say(ConditionType.RUNNING, "False", reason, message)
    draft.phase("Recovering", reason, message)


def _failed(draft: Draft, child: Child, accepted: Accepted | Refused, pods: tuple[Pod, ...]) -> None:
    """React to the cause; wait a little for pods that have not told it yet."""
    age = (draft.now - child.finished_at).total_seconds() if child.finished_at else LATEST_FACTS_SECONDS
    noted = draft.records[-1].last_exit_code
    if abs(age) < LATEST_FACTS_SECONDS and not (all(pod.ended for pod in pods) if pods else noted):
        message = "the attempt has failed, its pods have not told why yet"
        draft.said.say(ConditionType.RUNNING, "False", Reason.RESTARTING, message)
        draft.phase("Recovering", Reason.RESTARTING, message)
        draft.wake_after(LATEST_FACTS_SECONDS - age)
        return
    cause = draft.cause = ending(child, pods, draft.seen.workload, noted)
    if cause.reaction == "fail":
        draft.fail(cause.reason, cause.message)
    elif isinstance(accepted, Refused):
        _refuse(draft, accepted)
    else:
        after_failure(draft, accepted, cause)
