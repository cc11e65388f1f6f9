"""Conditions as values: setting one keeps the time of its last change."""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from atelier_api.v1alpha1.conditions import Condition, ConditionType, Reason
from atelier_operator.times import format_time

Verdict = Literal["True", "False", "Unknown"]

LONGEST_MESSAGE = 2000


class Said:
    """What a pass says of a run; later statements about the same type replace earlier ones."""

    def __init__(self, generation: int, now: datetime) -> None:
        self._generation = generation
        self._now = format_time(now)
        self._said: dict[ConditionType, Condition] = {}

    def say(self, kind: ConditionType, verdict: Verdict, reason: Reason | str, message: str = "") -> None:
        """Set a condition."""
        self._said[kind] = Condition(
            type=kind,
            status=verdict,
            reason=str(reason),
            message=message[:LONGEST_MESSAGE],
            observed_generation=self._generation,
            last_transition_time=self._now,
        )

    def over(self, before: Iterable[Condition]) -> list[Condition]:
        """The conditions of before with what was said laid over them, in the order of their types."""
        result = {condition.type: condition for condition in before}
        for kind, condition in self._said.items():
            old = result.get(kind)
            if old is not None and old.status == condition.status:
                condition = condition.model_copy(update={"last_transition_time": old.last_transition_time})
            result[kind] = condition
        order = [str(kind) for kind in ConditionType]
        return sorted(result.values(), key=lambda each: order.index(each.type) if each.type in order else len(order))
