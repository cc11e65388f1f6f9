"""What is refused before anything is created, and how it is said."""

from typing import Any

import pytest

from atelier_api.v1alpha1.conditions import Reason
from atelier_operator.observed import Run, read_profile
from run_stories import PROFILE, Story, profile, raw_run

LARGE = {"model": {"family": "flux"}, "adapter": {"type": "full"}, "parallelism": {"gpuClass": "l4-24g"}}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str, str, str]] = {
    "a field out of bounds": (
        {"hyperparameters": {"steps": 0}},
        {},
        "Accepted",
        "InvalidSpec",
        "spec.hyperparameters.steps is 0",
    ),
    "a rule between fields": (
        {"hyperparameters": {"globalBatchSize": 3}},
        {},
        "Accepted",
        "InvalidSpec",
        "spec.hyperparameters.globalBatchSize",
    ),
    "a relative path": (
        {"storage": {"uri": "elsewhere"}},
        {},
        "Accepted",
        "InvalidSpec",
        "absolute path of a volume that the profile mounts",
    ),
    "a kind of GPU that the profile lacks": (
        {"parallelism": {"gpuClass": "h10-80g"}},
        {},
        "Accepted",
        "InvalidSpec",
        "did you mean h100-80g?",
    ),
    "GPUs without any kind": ({}, {"gpuClasses": []}, "Accepted", "InvalidSpec", "the profile has no gpuClasses"),
    "a network that the profile lacks": (
        {"parallelism": {"network": "roce"}},
        {},
        "Accepted",
        "InvalidSpec",
        "no such network",
    ),
    "no profile": ({}, None, "Accepted", "ProfileNotFound", "ClusterTrainingProfile default, which does not exist"),
    "more nodes than allowed": ({}, {"limits": {"nodes": 1}}, "Accepted", "NotPermitted", "nodes is 2"),
    "more GPUs than allowed": ({}, {"limits": {"gpus": 1}}, "Accepted", "NotPermitted", "asks for 2 GPUs"),
    "a model that is not allowed": (
        {},
        {"allowedModels": ["hf://stabilityai/"]},
        "Accepted",
        "NotPermitted",
        "begin with hf://stabilityai/",
    ),
    "too large for the GPU": (LARGE, {}, "Fits", "DoesNotFit", "does not fit"),
}


@pytest.mark.parametrize(("spec", "changes", "condition", "reason", "words"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_work_waits_with_the_reason_and_makes_nothing(
    spec: dict[str, Any], changes: dict[str, Any] | None, condition: str, reason: str, words: str
) -> None:
    story = Story(**spec)
    story.profile = None if changes is None else profile(**changes)
    decided = story.look()
    assert (story.status.phase, story.status.reason) == ("Pending", reason)
    assert (story.condition(condition).status, story.condition(condition).reason) == ("False", reason)
    assert words in story.status.message
    assert (decided.create, decided.delete) == ((), ())
    assert [event.type for event in decided.events] == ["Warning"]
    assert story.look(60).events == ()


def test_a_run_that_does_not_fit_has_a_valid_spec() -> None:
    story = Story(**LARGE)
    story.look()
    assert story.condition("Accepted").status == "True"


def test_a_run_is_accepted_once_its_profile_is_there() -> None:
    story = Story()
    story.profile = None
    story.look()
    story.profile = profile()
    story.look()
    assert story.condition("Accepted").status == "True"
    assert story.condition("Fits").reason == "Predicted"
    assert story.status.attempt == 1


def test_fit_is_unknown_on_the_cpu() -> None:
    story = Story(parallelism={"gpusPerNode": 0})
    story.look()
    assert (story.condition("Fits").status, story.status.attempt) == ("Unknown", 1)


def test_a_spec_that_is_refused_by_now_ends_no_attempt_that_is_under_way() -> None:
    story = Story()
    story.look()
    story.train()
    story.edit("hyperparameters", steps=0)
    story.look()
    assert (story.status.phase, story.condition("Accepted").reason) == ("Running", "InvalidSpec")


@pytest.mark.parametrize("suspend", [False, True])
def test_a_started_run_that_is_refused_does_not_go_back_to_pending(suspend: bool) -> None:
    """In Pending its whole spec may be changed."""
    story = Story()
    story.look()
    story.vanish()
    story.edit("hyperparameters", steps=0)
    story.edit("schedule", suspend=suspend)
    story.look()
    assert story.status.phase == ("Suspended" if suspend else "Recovering")
    assert story.condition("Accepted").reason == "InvalidSpec"


def test_a_profile_that_cannot_be_read_is_quoted() -> None:
    found, problem = read_profile({"spec": PROFILE | {"gpuClasses": [{"name": "x", "memory": "much"}]}})
    assert found is None
    assert "spec.gpuClasses.0.memory" in problem
    assert '"much"' in problem


def test_the_document_is_what_the_user_wrote() -> None:
    raw = raw_run()
    raw["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    assert Run.of(raw).document["metadata"] == {"name": "knight", "namespace": "art"}


def test_every_reason_is_a_word() -> None:
    assert all(reason.isalpha() and len(reason) < 63 for reason in Reason)
