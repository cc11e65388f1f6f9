"""Another attempt: which restart counts, when they are used up, how long the pause before it is, which plan it gets."""

from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_operator.exit_rules import MOST_REPLANS, MOST_UNCOUNTED
from atelier_operator.plan import attempts
from atelier_operator.plan.acceptance import Accepted
from atelier_operator.plan.deadlines import overdue
from atelier_operator.plan.draft import Draft
from atelier_operator.plan.ending import Ending, of_loss
from atelier_operator.plan.starting import replanned, start
from atelier_operator.times import parse_time

LONGEST_BACKOFF_SECONDS = 600.0
LOSSES = (Reason.DELETED, Reason.NODE_LOST, Reason.GANG_TORN)
"""Reasons of attempts whose child is gone without having ended."""


def start_next(draft: Draft, accepted: Accepted) -> None:
    """The next attempt, unless a deadline is over."""
    present = attempts.present(draft.before, draft.seen)
    if not overdue(draft, accepted, present):
        start(draft, accepted, present + 1)


def after_failure(draft: Draft, accepted: Accepted, cause: Ending) -> None:
    """Another attempt after a cause that one may cure. Of a JobSet these are the ones that it does not cure itself."""
    if cause.reaction == "replan":
        _with_another_plan(draft, accepted, cause)
    else:
        _restart(draft, accepted, cause)


def after_loss(draft: Draft, accepted: Accepted) -> None:
    """Another attempt after the child was deleted: by somebody else, or by us because a node was lost."""
    draft.cause = of_loss(draft.records[-1])
    _restart(draft, accepted, draft.cause)


def _with_another_plan(draft: Draft, accepted: Accepted, cause: Ending) -> None:
    """Another attempt with a plan that needs less memory, where the spec leaves one."""
    if attempts.is_open(draft.records):
        draft.close_attempt(cause.reason, cause.message)
        ran_out = sum(record.reason == cause.reason for record in draft.records)
        if ran_out > MOST_REPLANS or replanned(draft, accepted) is None:
            draft.fail(cause.reason, f"{cause.message}; {_no_other_plan(ran_out)}")
            return
        draft.records = attempts.charged(draft.records, counted=False)
    start_next(draft, accepted)


def _no_other_plan(ran_out: int) -> str:
    if ran_out > MOST_REPLANS:
        return f"{MOST_REPLANS} plans that were to need less did not help"
    return "no other plan of this spec needs less memory"


def _restart(draft: Draft, accepted: Accepted, cause: Ending) -> None:
    """Another attempt, after a pause where haste makes it worse, unless the restarts are used up."""
    counted, retry = cause.reaction == "restart", accepted.run.spec.retry
    if attempts.is_open(draft.records):
        if counted and draft.used >= retry.max_restarts:
            text = f"{retry.max_restarts} restarts (spec.retry.maxRestarts) are used up; {cause.message}"
            draft.fail(Reason.MAX_RESTARTS, text)
            return
        if not counted and draft.uncounted >= MOST_UNCOUNTED:
            draft.fail(Reason.MAX_RESTARTS, f"restarted {draft.uncounted} times; {cause.message}")
            return
        draft.close_attempt(cause.reason, cause.message)
        draft.records = attempts.charged(draft.records, counted=counted)
    left = 0.0
    if counted or cause.reason == Reason.STORE_UNREACHABLE:
        left = _pause_left(draft, retry.backoff_seconds, draft.used if counted else draft.uncounted)
    if left <= 0:
        start_next(draft, accepted)
        return
    message = f"next attempt after a pause: {cause.message}"
    draft.said.say(ConditionType.RUNNING, "False", Reason.RESTARTING, message)
    draft.phase("Recovering", cause.reason, message)
    draft.wake_after(left)


def _pause_left(draft: Draft, seconds: int, restart: int) -> float:
    """Seconds until the next attempt: a pause after the end of the last one, doubled with each restart (from 1)."""
    pause = min(float(seconds * 2 ** max(0, restart - 1)), LONGEST_BACKOFF_SECONDS)
    end = parse_time(draft.records[-1].end) or draft.now
    return pause - max(0.0, (draft.now - end).total_seconds())
