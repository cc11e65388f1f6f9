"""From a run, what is seen of it and the time, to what is to be done. Pure."""

from atelier_operator.plan.life import plan
from atelier_operator.plan.outcome import Event, Plan, Ref

__all__ = ["Event", "Plan", "Ref", "plan"]
