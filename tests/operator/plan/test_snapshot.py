"""A started run goes on by what it was started with: its profile, and the spec but for what may change."""

from typing import Any

import pytest

from atelier_api.transitions import MUTABLE
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_operator.names import SNAPSHOT_KEY
from atelier_operator.snapshot import kept, read, text_of
from orders import order
from run_stories import Story, ended, profile, trained


def image(story: Story) -> str:
    """Image of the newest child's pods."""
    child = story.created[-1]
    job = child["spec"]["replicatedJobs"][0]["template"] if child["kind"] == "JobSet" else child
    found: str = job["spec"]["template"]["spec"]["containers"][0]["image"]
    return found


def test_a_snapshot_is_read_as_it_was_written() -> None:
    snapshot = order(profile={"currency": "EUR"}, retry={"maxRestarts": 1}).snapshot
    assert read({"data": {SNAPSHOT_KEY: text_of(snapshot)}}) == snapshot


@pytest.mark.parametrize(
    "raw", [None, {}, {"data": None}, {"data": {SNAPSHOT_KEY: "{"}}, {"data": {SNAPSHOT_KEY: "{}"}}]
)
def test_what_cannot_be_read_is_no_snapshot(raw: dict[str, Any] | None) -> None:
    assert read(raw) is None


@pytest.mark.parametrize("code", [80, 82, 83])
def test_another_attempt_is_made_by_the_profile_of_the_first(code: int) -> None:
    story = trained(jobset=False, retry={"backoffSeconds": 0}, hyperparameters={"globalBatchSize": 64})
    story.profile = profile(image="registry.example/other", gpuClasses=[])
    story.fail(ended(code), ended(code, 1))
    story.look(1)
    assert story.status.attempt == 2
    assert image(story) == profile().image


def test_a_profile_that_is_gone_does_not_hold_a_started_run_up() -> None:
    story = trained()
    story.fail(ended(75), ended(75, 1))
    story.profile = None
    story.look(1)
    assert (story.status.attempt, story.condition("Accepted").reason) == (2, "Valid")


def test_without_a_snapshot_the_profile_counts_as_it_is() -> None:
    """Somebody has deleted the ConfigMap, or an older operator has made it."""
    story = trained()
    story.fail(ended(75), ended(75, 1))
    story.snapshots, story.profile = {}, None
    story.look(1)
    assert (story.status.phase, story.status.reason) == ("Recovering", "ProfileNotFound")
    story.profile = profile(image="registry.example/other")
    story.look(1)
    assert (story.status.attempt, image(story)) == (2, "registry.example/other")


def test_a_run_that_is_stopped_and_resumed_takes_the_profile_as_it_is_now() -> None:
    story = trained()
    story.edit("schedule", suspend=True)
    story.look(1)
    story.vanish()
    story.look(1)
    story.profile = profile(image="registry.example/other")
    story.edit("schedule", suspend=False)
    story.look(1)
    assert (story.status.attempt, image(story)) == (2, "registry.example/other")
    story.fail(ended(75), ended(75, 1))
    story.profile = profile()
    story.look(1)
    assert (story.status.attempt, image(story)) == (3, "registry.example/other")


def test_a_change_that_a_started_run_may_not_have_is_ignored_and_said() -> None:
    story = trained()
    story.edit("model", family="flux")
    story.edit("hyperparameters", steps=200, seed=7)
    story.fail(ended(75), ended(75, 1))
    story.look(1)
    said = story.condition("Accepted")
    assert (said.status, said.reason, story.status.attempt) == ("True", "SpecDrift", 2)
    assert said.message.startswith("spec.model, spec.hyperparameters.seed changed after the start")
    spec = story.snapshots[2].spec  # type: ignore[union-attr]  # every attempt has one
    assert (spec.model.family, spec.hyperparameters.seed, spec.hyperparameters.steps) == ("sdxl", 42, 200)


def test_fewer_steps_than_at_the_start_are_ignored_and_said() -> None:
    story = trained()
    story.edit("hyperparameters", steps=50)
    story.look(1)
    assert story.condition("Accepted").message.startswith("spec.hyperparameters.steps changed")
    story.fail(ended(75), ended(75, 1))
    story.look(1)
    assert story.snapshots[2].spec.hyperparameters.steps == 100  # type: ignore[union-attr]  # every attempt has one


def test_what_may_change_is_no_drift() -> None:
    """Each field of the list that the CRD's rules are made from."""
    prompts = {"prompts": [{"text": "a knight"}]}
    then = order(validation=prompts).snapshot.spec
    changes: dict[str, dict[str, Any]] = {
        "hyperparameters": {"steps": 101},
        "storage": {"checkpoint": {"everySteps": 7}},
        "validation": {"everySteps": 9},
        "schedule": {
            "queue": "other",
            "priority": "high",
            "suspend": True,
            "startTimeoutSeconds": 5,
            "activeDeadlineSeconds": 6,
            "ttlSecondsAfterFinished": 7,
        },
        "retry": {"maxRestarts": 9, "backoffSeconds": 8},
    }
    assert {block: tuple(fields) for block, fields in changes.items()} == MUTABLE
    now = order(**changes | {"validation": changes["validation"] | prompts}).snapshot.spec
    spec, drift = kept(now, then)
    assert (spec, drift) == (now, ())


def test_every_other_block_is_kept() -> None:
    then = order().snapshot.spec
    wire = then.model_dump(mode="json", by_alias=True, exclude_none=True)
    wire["model"]["source"] = "/models/other"
    wire["adapter"]["rank"] = 5
    wire["parallelism"]["nodes"] = 1
    wire["storage"]["uri"] = "s3://bucket/elsewhere"
    wire["schedule"]["terminationGraceSeconds"] = 99
    spec, drift = kept(TrainingRunSpec.model_validate(wire), then)
    assert spec == then
    assert set(drift) == {
        "spec.model",
        "spec.adapter",
        "spec.parallelism",
        "spec.storage.uri",
        "spec.schedule.terminationGraceSeconds",
    }
