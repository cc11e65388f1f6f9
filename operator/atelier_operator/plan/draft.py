"""A plan while it is made: what a pass has found out so far, and what is to be done."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_api.v1alpha1.status import MOST_NODES_EXCLUDED, AttemptStatus, Phase, PlanStatus, RunStatus
from atelier_operator.observed import Backend, Child, Observed, Run
from atelier_operator.plan import attempts
from atelier_operator.plan.conditions import Said
from atelier_operator.plan.cost import Rate, charged
from atelier_operator.plan.ending import Ending
from atelier_operator.plan.outcome import Event, Plan, Ref
from atelier_operator.times import format_time

LONGEST_MESSAGE = 2000
KINDS: dict[Backend, Literal["JobSet", "Job"]] = {"jobset": "JobSet", "job": "Job"}


class Draft:
    """One pass over one run. `before` is the status that it starts from; `fields` lie over it in the end."""

    def __init__(self, run: Run, seen: Observed, now: datetime) -> None:
        self.run, self.seen, self.now = run, seen, now
        self.before = run.status
        self.said = Said(run.generation, now)
        self.fields: dict[str, Any] = {"observed_generation": run.generation}
        self.records: list[AttemptStatus] = list(run.status.attempts)
        self.create: list[dict[str, Any]] = []
        self.delete: list[Ref] = []
        self.cause: Ending | None = None
        self.requeue: float | None = None
        self.rate = Rate(self.nodes * self._gpus_per_node)

    @property
    def suspend(self) -> bool:
        """Whether the user wants the run suspended. Read from the raw spec: it counts for a refused one as well."""
        return bool(self._block("schedule").get("suspend"))

    @property
    def nodes(self) -> int:
        """Nodes that the spec asks for."""
        nodes = self._block("parallelism").get("nodes")
        return nodes if isinstance(nodes, int) else 1

    @property
    def _gpus_per_node(self) -> int:
        gpus = self._block("parallelism").get("gpusPerNode")
        return gpus if isinstance(gpus, int) else 0

    def _block(self, name: str) -> Mapping[str, Any]:
        """A block of the raw spec, whatever the spec is: nothing of a refused one has been checked."""
        spec = self.run.document.get("spec")
        block = spec.get(name) if isinstance(spec, Mapping) else None
        return block if isinstance(block, Mapping) else {}

    @property
    def used(self) -> int:
        """Restarts that have been counted so far."""
        return attempts.restarts(self.records, self.before, None).counted

    @property
    def uncounted(self) -> int:
        """Restarts so far that do not count."""
        return attempts.restarts(self.records, self.before, None).uncounted

    @property
    def start_time(self) -> str | None:
        """When the run has started to train."""
        time: str | None = self.fields.get("start_time", self.before.start_time)
        return time

    @property
    def present_plan(self) -> PlanStatus | None:
        """How the present attempt is executed."""
        plan: PlanStatus | None = self.fields.get("plan", self.before.plan)
        return plan

    @property
    def excluded_nodes(self) -> list[str]:
        """Nodes that the next attempt avoids."""
        known = list(self.before.excluded_nodes)
        if self.cause and self.cause.reaction == "avoid-node" and self.cause.node:
            known = [node for node in known if node != self.cause.node] + [self.cause.node]
        return known[-MOST_NODES_EXCLUDED:]

    def phase(self, phase: Phase, reason: Reason | str, message: str) -> None:
        """Set the summary for people."""
        self.fields |= {"phase": phase, "reason": str(reason), "message": message[:LONGEST_MESSAGE]}

    def wake_after(self, seconds: float) -> None:
        """Look at the run again after so long, unless it is to be looked at before."""
        self.requeue = min(seconds, seconds if self.requeue is None else self.requeue)

    def remove(self, child: Child) -> None:
        """Delete a child; its pods get their grace to commit a checkpoint."""
        if not child.deleting:
            self.delete.append(Ref(KINDS[child.backend], self.run.namespace, child.name, child.uid))

    def close_attempt(self, reason: Reason | str, message: str) -> None:
        """Note how the present attempt has ended, once."""
        if attempts.is_open(self.records):
            self.said.say(ConditionType.SCHEDULED, "False", Reason.ENDED)
        self.records = attempts.ended(self.records, str(reason), message, self.now)

    def succeed(self) -> None:
        """The run has ended well."""
        self.said.say(ConditionType.SUCCEEDED, "True", Reason.COMPLETED)
        self.said.say(ConditionType.FAILED, "False", Reason.COMPLETED)
        self._end("Succeeded", Reason.COMPLETED, "trained and published")

    def fail(self, reason: Reason | str, message: str) -> None:
        """The run has ended badly."""
        self.said.say(ConditionType.FAILED, "True", reason, message)
        self.said.say(ConditionType.SUCCEEDED, "False", reason)
        self._end("Failed", reason, message)

    def _end(self, phase: Phase, reason: Reason | str, message: str) -> None:
        self.said.say(ConditionType.RUNNING, "False", Reason.ENDED)
        self.close_attempt(reason, message)
        self.fields["completion_time"] = format_time(self.now)
        if self.before.queue is not None:
            self.fields["queue"] = self.before.queue.model_copy(update={"position": None})
        self.requeue = 0.5  # to begin with its time to live
        self.phase(phase, reason, message)

    def done(self) -> Plan:
        """The plan."""
        status = self.before.model_copy(
            update=self.fields
            | {
                "conditions": self.said.over(self.before.conditions),
                "attempts": self.records,
                "restarts": attempts.restarts(self.records, self.before, self.cause),
                "excluded_nodes": self.excluded_nodes,
            }
        )
        if status != self.before:  # the price of time alone is not worth a write
            child = self.seen.child(self.before.attempt)
            until = min(self.now, (child.finished_at if child else None) or self.now)
            status = status.model_copy(update={"cost": charged(self.before, status, self.rate, until)})
        return Plan(
            status=status,
            create=tuple(self.create),
            delete=tuple(self.delete),
            events=tuple(_events(self.before, status)),
            requeue_seconds=self.requeue,
        )


def _events(before: RunStatus, after: RunStatus) -> list[Event]:
    """One line for each change of phase or reason, so that `kubectl describe` reads as a story."""
    if (before.phase, before.reason) == (after.phase, after.reason):
        return []
    bad = after.phase in ("Failed", "Pending")
    return [Event("Warning" if bad else "Normal", after.reason or after.phase, f"{after.phase}: {after.message}")]
