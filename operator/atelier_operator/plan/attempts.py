"""The record of attempts: which is the present one, how earlier ones ended, and how many restarts they used up."""

from datetime import datetime

from atelier_api.v1alpha1.status import MOST_ATTEMPTS, AttemptStatus, RestartsStatus, RunStatus
from atelier_operator.exit_rules import FINAL_CODES
from atelier_operator.observed import Child, Observed
from atelier_operator.plan.ending import Ending
from atelier_operator.times import format_time

SUSPENDED = "Suspended"
STOPPED_ON_REQUEST = "stopped on request"


def present(status: RunStatus, seen: Observed) -> int:
    """Number of the present attempt; 0: none yet. A child that the status does not know of was made before a crash."""
    return max([status.attempt, *(child.attempt for child in seen.children)])


def is_open(records: list[AttemptStatus]) -> bool:
    """Whether the newest attempt has not ended."""
    return bool(records) and records[-1].end is None


def recorded(records: list[AttemptStatus], child: Child, step: int | None, cause: Ending | None) -> list[AttemptStatus]:
    """The records with what is known of the present child laid over its own. `cause`: why its present pods have ended."""
    old = next((each for each in records if each.number == child.attempt), None)
    start = old.start if old else format_time(child.created) if child.created else ""
    new = AttemptStatus(
        number=child.attempt,
        start=start,
        end=old.end if old else None,
        reason=old.reason if old else None,
        message=old.message if old else "",
        counted=max(child.restarts_counted, old.counted if old else 0),
        uncounted=max(child.restarts - child.restarts_counted, old.uncounted if old else 0),
        last_exit_code=_last_code(old, cause),
        to_step=max((each for each in (step, old.to_step if old else None) if each and each > 0), default=None),
    )
    others = [each for each in records if each.number != child.attempt]
    return [*others[-(MOST_ATTEMPTS - 1) :], new]


def _last_code(old: AttemptStatus | None, cause: Ending | None) -> int | None:
    """A code after which no pods of this attempt start again is not displaced by what its peers end with later."""
    noted = old.last_exit_code if old else None
    return noted if cause is None or noted in FINAL_CODES else cause.code


def opened(records: list[AttemptStatus], number: int, now: datetime) -> list[AttemptStatus]:
    """The records with a new attempt."""
    return [*records[-(MOST_ATTEMPTS - 1) :], AttemptStatus(number=number, start=format_time(now))]


def ended(records: list[AttemptStatus], reason: str, message: str, now: datetime) -> list[AttemptStatus]:
    """The records with the newest closed."""
    if not is_open(records):
        return records
    closed = {"end": format_time(now), "reason": reason, "message": message[:2000]}
    return [*records[:-1], records[-1].model_copy(update=closed)]


def marked(records: list[AttemptStatus], reason: str, message: str) -> list[AttemptStatus]:
    """The records with the newest, which is open until its child is gone, marked with why we have deleted that child."""
    if not is_open(records):
        return records
    return [*records[:-1], records[-1].model_copy(update={"reason": str(reason), "message": message[:2000]})]


def restarts(records: list[AttemptStatus], before: RunStatus, cause: Ending | None) -> RestartsStatus:
    """All restarts: those inside attempts, and those that made a new attempt. Those of attempts that have left the list
    for newer ones are in the sums of before, so what the records have grown by is added to these."""
    old = {each.number: each for each in before.attempts}
    new = [(each, old.get(each.number, AttemptStatus(number=each.number, start=""))) for each in records]
    return RestartsStatus(
        counted=before.restarts.counted + sum(each.counted - known.counted for each, known in new),
        uncounted=before.restarts.uncounted + sum(each.uncounted - known.uncounted for each, known in new),
        last_reason=cause.reason if cause else before.restarts.last_reason,
        last_exit_code=cause.code if cause else before.restarts.last_exit_code,
    )


def charged(records: list[AttemptStatus], *, counted: bool) -> list[AttemptStatus]:
    """The records with one restart more on the newest, which another attempt follows."""
    field = "counted" if counted else "uncounted"
    newest = records[-1]
    return [*records[:-1], newest.model_copy(update={field: getattr(newest, field) + 1})]
