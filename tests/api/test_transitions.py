"""What of a run may change after it has been started."""

import copy
from typing import Any

import pytest

from atelier_api.fields import tree
from atelier_api.transitions import MUTABLE, transition_rules
from run_documents import document
from structural_schema import refused_updates

CHANGES = {
    "model": ("model", "source", "other"),
    "adapter": ("adapter", "rank", 3),
    "trigger": ("data", "captions", {"trigger": "x"}),
    "seed": ("hyperparameters", "seed", 7),
    "learning rate": ("hyperparameters", "learningRate", "2e-4"),
    "fewer steps": ("hyperparameters", "steps", 1),
    "nodes": ("parallelism", "nodes", 2),
    "store": ("storage", "uri", "elsewhere"),
    "grace": ("schedule", "terminationGraceSeconds", 60),
}
ALLOWED = {
    "more steps": ("hyperparameters", "steps", 9_000_000),
    "queue": ("schedule", "queue", "other"),
    "suspend": ("schedule", "suspend", True),
    "ttl": ("schedule", "ttlSecondsAfterFinished", 5),
    "restarts": ("retry", "maxRestarts", 9),
    "checkpoints": ("storage", "checkpoint", {"everySteps": 7}),
    "samples": ("validation", "everySteps", 7),
}


def updated(change: tuple[str, str, Any], phase: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run in a phase, and the same with one field of its spec changed."""
    old = document()
    if phase is not None:
        old["status"] = {"phase": phase}
    new = copy.deepcopy(old)
    block, field, value = change
    new["spec"].setdefault(block, {})[field] = value
    return old, new


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("phase", [None, "Pending"])
def test_a_run_that_has_not_started_may_change(change: tuple[str, str, Any], phase: str | None) -> None:
    assert refused_updates(*updated(change, phase)) == []


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("phase", ["Queued", "Running", "Suspended", "Failed"])
def test_a_started_run_may_not(change: tuple[str, str, Any], phase: str) -> None:
    refused = refused_updates(*updated(change, phase))
    assert refused, change
    assert all(path.startswith(f"spec.{change[0]}") for path in refused)


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_may_change_in_a_started_run(change: tuple[str, str, Any]) -> None:
    assert refused_updates(*updated(change, "Running")) == []


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_an_ended_run_gets_no_more_steps(phase: str) -> None:
    assert refused_updates(*updated(ALLOWED["more steps"], phase)) == ["spec.hyperparameters.steps"]


def test_every_field_that_may_change_exists() -> None:
    spec = tree().fields["spec"]
    for block, names in MUTABLE.items():
        assert set(names) <= set(spec.fields[block].fields), block


def test_every_block_has_a_rule() -> None:
    ruled = {rule.field.partition(".")[0] for rule in transition_rules()}
    assert ruled >= set(tree().fields["spec"].fields) - {"retry"}
