"""What of a run may change after it has been started, as transition rules in CEL.

Once the phase has left Pending a run is what it is: another model or batch is another run. What may change is listed here, and
nowhere else. A change takes effect with the next attempt; a live one keeps the RunFile that it was started with.
"""

from collections.abc import Iterator, Mapping

from atelier_api.cel_rule import CelRule
from atelier_api.fields import tree

MUTABLE: Mapping[str, tuple[str, ...]] = {
    "hyperparameters": ("steps",),
    "storage": ("checkpoint",),
    "validation": ("everySteps",),
    "schedule": (
        "queue",
        "priority",
        "suspend",
        "startTimeoutSeconds",
        "activeDeadlineSeconds",
        "ttlSecondsAfterFinished",
    ),
    "retry": ("maxRestarts", "backoffSeconds"),
}
"""By block of the spec: the fields that may change in a started run. A block that is not named may not change at all."""

STARTED = "has(oldSelf.status) && has(oldSelf.status.phase) && oldSelf.status.phase != 'Pending'"
FINISHED = "has(oldSelf.status) && has(oldSelf.status.phase) && oldSelf.status.phase in ['Succeeded', 'Failed']"


def transition_rules() -> list[CelRule]:
    """Rules of the whole object; `field` is a path below spec."""
    rules = [rule for block in tree().fields["spec"].fields for rule in _block_rules(block)]
    steps = "spec.hyperparameters.steps"
    rules.append(
        CelRule(
            "hyperparameters.steps",
            f"!({STARTED}) || self.{steps} >= oldSelf.{steps}",
            "may only grow once the run has been started",
        )
    )
    rules.append(
        CelRule(
            "hyperparameters.steps",
            f"!({FINISHED}) || self.{steps} == oldSelf.{steps}",
            "cannot change once the run has ended; make a new run",
        )
    )
    return rules


def _block_rules(block: str) -> Iterator[CelRule]:
    """One rule for a block that may not change, one for each fixed field of the others."""
    fixed = "cannot change once the run has been started; make a new run"
    if block not in MUTABLE:
        yield CelRule(block, f"!({STARTED}) || {_same(f'spec.{block}')}", fixed)
        return
    node = tree().fields["spec"].fields[block]
    for name, field in node.fields.items():
        if name not in MUTABLE[block]:
            yield CelRule(f"{block}.{name}", f"!({STARTED}) || {_same(f'spec.{block}.{name}', field.nullable)}", fixed)


def _same(path: str, nullable: bool = False) -> str:
    """Whether a field is what it was. A nullable one may be absent on either side."""
    equal = f"self.{path} == oldSelf.{path}"
    if not nullable:
        return equal
    return f"(has(self.{path}) ? has(oldSelf.{path}) && {equal} : !has(oldSelf.{path}))"
