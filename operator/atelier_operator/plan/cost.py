"""What a run costs: the time for which its gang has held GPUs, and the price of that.

Added up over time, not read from the pods: these are gone when the sum is asked for. An operator that was away adds what went by
meanwhile, up to the end of the child, if all pods had nodes when it last looked.
"""

from dataclasses import dataclass
from datetime import datetime

from atelier_api.v1alpha1.conditions import ConditionType
from atelier_api.v1alpha1.status import CostStatus, RunStatus
from atelier_operator.times import format_time, parse_time

HOUR = 3600
DIGITS = 6
"""Of an amount of money: ten seconds of one GPU are to count."""


@dataclass(frozen=True)
class Rate:
    """GPUs of the whole run. `price` is that of one for an hour, in `currency`; None where the profile does not say it."""

    gpus: int
    price: float | None = None
    currency: str | None = None

    def amount(self, gpu_seconds: float) -> float | None:
        return None if self.price is None else self.price * gpu_seconds / HOUR


def charged(before: RunStatus, after: RunStatus, rate: Rate, until: datetime) -> CostStatus | None:
    """The cost up to a time; None as long as the run has never held a GPU. `before` says whether it did when it was last looked at."""
    old = before.cost
    if rate.gpus == 0 or (old is None and not _holds(after)):
        return old
    old = old or CostStatus(measured_at=format_time(until))
    since = parse_time(old.measured_at) or until
    seconds = max(0, round((until - since).total_seconds())) if _holds(before) else 0
    new = rate.amount(rate.gpus * seconds)
    spent = old.spent if new is None else round((old.spent or 0.0) + new, DIGITS)
    return CostStatus(
        gpu_seconds=old.gpu_seconds + rate.gpus * seconds,
        measured_at=format_time(max(until, since)),
        spent=spent,
        expected=_expected(after, rate, spent),
        currency=rate.currency if new is not None else old.currency,
    )


def _holds(status: RunStatus) -> bool:
    """Whether all pods of the run have nodes."""
    return any(each.type == ConditionType.SCHEDULED and each.status == "True" for each in status.conditions)


def _expected(status: RunStatus, rate: Rate, spent: float | None) -> float | None:
    """What the whole run will have cost, by the time that its trainer says is left; what it has cost once it has ended."""
    if spent is None or status.phase in ("Succeeded", "Failed"):
        return spent
    left = status.progress.eta_seconds if status.progress else None
    rest = None if left is None else rate.amount(rate.gpus * left)
    return None if rest is None else round(spent + rest, DIGITS)
