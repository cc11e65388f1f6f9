"""Times that end a run, or delete it after its end."""

from datetime import datetime, timedelta

from atelier_api.v1alpha1.conditions import Reason
from atelier_operator.observed import Run
from atelier_operator.plan.acceptance import Accepted
from atelier_operator.plan.draft import Draft
from atelier_operator.plan.outcome import Plan, Ref
from atelier_operator.times import parse_time


def overdue(draft: Draft, accepted: Accepted, number: int) -> bool:
    """End the run when a deadline is over; asks to be woken at the next one."""
    for end, reason, message in _limits(draft, accepted):
        left = (end - draft.now).total_seconds()
        if left > 0:
            draft.wake_after(left)
            continue
        child = draft.seen.child(number)
        if child is not None:
            draft.remove(child)
        draft.fail(reason, message)
        return True
    return False


def _limits(draft: Draft, accepted: Accepted) -> list[tuple[datetime, Reason, str]]:
    schedule, started = accepted.run.spec.schedule, parse_time(draft.start_time)
    if started is not None:
        seconds = schedule.active_deadline_seconds
        text = f"spec.schedule.activeDeadlineSeconds ({seconds}) are over; stopped with a checkpoint"
        return [(started + timedelta(seconds=seconds), Reason.DEADLINE_EXCEEDED, text)] if seconds is not None else []
    seconds, created = schedule.start_timeout_seconds, draft.run.created
    if seconds is None or created is None:
        return []
    text = f"did not start to train within spec.schedule.startTimeoutSeconds ({seconds})"
    return [(created + timedelta(seconds=seconds), Reason.START_TIMEOUT, text)]


def after_the_end(run: Run, now: datetime) -> Plan:
    """Delete the object when its time is over; what lies in the store stays."""
    seconds = ((run.document.get("spec") or {}).get("schedule") or {}).get("ttlSecondsAfterFinished")
    end = parse_time(run.status.completion_time)
    if seconds is None or end is None:
        return Plan(run.status)
    left = (end + timedelta(seconds=seconds) - now).total_seconds()
    if left > 0:
        return Plan(run.status, requeue_seconds=left)
    return Plan(run.status, delete=(Ref("TrainingRun", run.namespace, run.name, run.uid),))
