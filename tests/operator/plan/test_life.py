"""The whole life of a run: training, publishing, restarts, suspension, the end, and what is left alone after it."""

from dataclasses import replace

import pytest

from atelier_api.progress import ArtifactReport, CheckpointReport, FunnelReport
from atelier_operator.observed import Apis
from run_stories import Story, ended, pod, trained


def test_a_run_goes_from_preparing_to_succeeded() -> None:
    story = Story()
    phases = []
    story.look()
    phases.append(story.status.phase)
    story.train(0, "Caching", detail="encoding captions 3/12")
    story.look(5)
    phases.append(story.status.phase)
    assert story.status.message == "encoding captions 3/12"
    for step, stage in ((10, "Training"), (50, "Sampling"), (100, "Publishing"), (100, "Succeeded")):
        story.train(step, stage)
        story.look(10)
        phases.append(story.status.phase)
    story.complete()
    decided = story.look(5)
    phases.append(story.status.phase)
    assert phases == ["Preparing", "Preparing", "Running", "Running", "Publishing", "Publishing", "Succeeded"]
    status = story.status
    assert (status.start_time, status.completion_time) == ("2026-11-01T12:00:05Z", "2026-11-01T12:00:50Z")
    assert (story.condition("Succeeded").status, story.condition("Failed").status) == ("True", "False")
    assert (status.attempts[0].reason, status.attempts[0].to_step) == ("Completed", 100)
    assert status.progress is not None
    assert (status.progress.percent, status.progress.stage) == (100, "Succeeded")
    assert [event.reason for event in decided.events] == ["Completed"]


def test_the_end_tells_of_all_steps_also_when_the_operator_was_away_for_each() -> None:
    story = Story()
    story.look()
    story.train(0, "Preparing", total_steps=0)
    story.look(5)
    story.progress = None
    story.complete()
    story.look(60)
    progress = story.status.progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.percent) == (100, 100, 100)


LORA = ArtifactReport(format="diffusers", key="exports/diffusers/lora.safetensors", size_bytes=9, sha256="ab")


def artifact_uris(story: Story) -> list[str]:
    return [each.uri.removeprefix(f"{story.status.store_uri}/") for each in story.status.artifacts]


def test_what_was_published_is_in_the_status_also_when_the_operator_was_away() -> None:
    """The first node's agent leaves it; nobody has asked it for its progress."""
    story = trained()
    story.progress = None
    story.complete()
    first, second = story.pods
    assert first.result is not None
    story.pods = (replace(first, result=first.result.model_copy(update={"artifacts": [LORA]})), second)
    story.look(1)
    assert (story.status.phase, artifact_uris(story)) == ("Succeeded", [LORA.key])


def test_what_was_published_may_be_known_from_the_progress_alone() -> None:
    story = trained()
    story.train(100, "Succeeded", artifacts=[LORA.model_dump()])
    story.complete()
    story.pods = ()
    story.look(1)
    assert (story.status.phase, artifact_uris(story)) == ("Succeeded", [LORA.key])


def test_the_status_holds_what_the_runtime_tells() -> None:
    story = Story()
    story.look()
    story.train(
        25,
        loss=0.123456,
        samples_per_second=3.14159,
        eta_seconds=12.6,
        peak_memory_bytes=1 << 30,
        checkpoint=CheckpointReport(
            step=20, manifest="manifests/20.json", size_bytes=9, manifest_sha256="ab", time="2026-11-01T12:00:00Z"
        ),
        samples=["samples/20/0.webp"],
        funnel=FunnelReport(found=12, kept=10, unreadable=2),
        updated_at="2026-11-01T12:00:04Z",
    )
    story.look(5)
    status, store = story.status, "s3://bucket/runs/art/knight-0a1b2c3d-0000-4000-8000-000000000000"
    assert status.progress is not None
    assert (status.progress.step, status.progress.percent, status.progress.loss) == (25, 25, 0.1235)
    assert (status.progress.samples_per_second, status.progress.eta_seconds) == (3.142, 13)
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.uri) == (20, f"{store}/manifests/20.json")
    assert status.samples == [f"{store}/samples/20/0.webp"]
    assert status.data is not None
    assert (status.data.found, status.data.kept, status.data.unreadable) == (12, 10, 2)
    assert story.condition("Checkpointed").status == "True"


def test_a_checkpoint_never_goes_back() -> None:
    story = trained()
    report = CheckpointReport(step=50, manifest="50", size_bytes=1, manifest_sha256="", time="")
    story.train(51, checkpoint=report)
    story.look(5)
    story.train(41, checkpoint=report.model_copy(update={"step": 40, "manifest": "40"}))
    story.look(5)
    assert story.status.checkpoint is not None
    assert story.status.checkpoint.step == 50


def test_a_run_is_not_said_to_start_again_when_the_operator_does() -> None:
    """A new process has no progress of its pods yet: nothing is written until it has."""
    story = trained()
    story.progress = None
    decided = story.look(1)
    assert (story.status.phase, decided.events) == ("Running", ())
    story.change(restarts=1, restarts_counted=1)
    story.look(1)
    assert story.status.phase == "Recovering"


def test_a_jobset_that_restarts_its_pods_recovers_and_is_counted() -> None:
    story = trained()
    story.pods, story.progress = (ended(82, 0), ended(137, 1, exit_reason="OOMKilled")), None
    story.look(2)
    assert (story.status.phase, story.status.reason) == ("Recovering", "BackendError")
    story.change(restarts=1, restarts_counted=1)
    story.pods = tuple(pod(index, restart=1) for index in range(2))
    story.look(2)
    assert (story.status.phase, story.status.restarts.counted) == ("Recovering", 1)
    story.train(12)
    story.pods = tuple(replace(each, restart=1) for each in story.pods)
    story.look(2)
    assert (story.status.phase, story.status.attempt, story.status.restarts.last_exit_code) == ("Running", 1, 137)


# --- suspension -------------------------------------------------------------------------------------------------------


def test_a_run_that_is_made_suspended_waits_and_then_starts() -> None:
    story = Story(schedule={"suspend": True})
    decided = story.look()
    assert (story.status.phase, decided.create) == ("Suspended", ())
    story.edit("schedule", suspend=False)
    story.look(60)
    assert (story.status.phase, story.status.attempt, story.status.restarts.counted) == ("Preparing", 1, 0)


@pytest.mark.parametrize("phase", ["Queued", "Preparing", "Running"])
def test_suspension_stops_with_a_checkpoint_and_resuming_charges_no_restart(phase: str) -> None:
    story = Story(kueue=phase == "Queued", schedule={"queue": "gpu"})
    story.look()
    if phase == "Running":
        story.train()
        story.look(5)
    elif phase == "Preparing":
        story.run_pods()
        story.look(5)
    assert story.status.phase == phase
    story.edit("schedule", suspend=True)
    decided = story.look(5)
    assert [(each.kind, each.name, each.uid) for each in decided.delete] == [("JobSet", "knight-1", "uid-knight-1")]
    assert (story.status.phase, story.status.reason) == ("Suspended", "Stopping")
    if phase != "Queued":
        assert story.status.message == "2 pods are committing a checkpoint"
    assert story.look(5).delete == ()
    story.vanish()
    story.look(5)
    assert (story.status.reason, story.condition("Suspended").status) == ("Requested", "True")
    assert (story.condition("Admitted").status, story.status.queue) == ("False", None)
    story.edit("schedule", suspend=False)
    story.look(5)
    status = story.status
    assert (status.attempt, status.restarts.counted, status.restarts.uncounted) == (2, 0, 0)
    assert [record.reason for record in status.attempts] == ["Suspended", None]


def test_who_changes_his_mind_while_the_pods_stop_is_not_charged() -> None:
    story = trained()
    story.edit("schedule", suspend=True)
    story.look(5)
    story.edit("schedule", suspend=False)
    story.look(5)
    assert (story.status.phase, story.status.attempt) == ("Recovering", 1)
    story.vanish()
    story.look(5)
    assert (story.status.attempt, story.status.restarts.counted) == (2, 0)


def test_a_child_that_completes_while_it_is_stopped_has_succeeded() -> None:
    story = trained()
    story.edit("schedule", suspend=True)
    story.look(5)
    assert story.status.attempts[0].end is None, "until its child is gone, so that it is looked for"
    story.complete()
    story.look(5)
    assert (story.status.phase, story.status.attempts[0].reason) == ("Succeeded", "Completed")


def test_a_failed_child_of_a_suspended_run_is_kept_until_it_is_resumed() -> None:
    story = trained()
    story.fail(ended(64), ended(82, 1))
    story.edit("schedule", suspend=True)
    decided = story.look(5)
    assert (story.status.phase, story.status.reason, decided.delete) == ("Suspended", "Requested", ())
    story.edit("schedule", suspend=False)
    story.look(5)
    assert (story.status.phase, story.status.reason) == ("Failed", "InvalidConfig")


def test_a_refused_spec_can_still_be_suspended() -> None:
    story = trained()
    story.profile = None
    story.edit("schedule", suspend=True)
    assert len(story.look(5).delete) == 1


# --- the end ----------------------------------------------------------------------------------------------------------


def test_more_steps_make_another_attempt_after_the_asked_ones_are_done() -> None:
    story = trained()
    story.edit("hyperparameters", steps=200)
    assert story.look(1).create == ()
    story.complete()
    story.look(1)
    assert [record.reason for record in story.status.attempts] == ["Completed", None]
    assert (story.status.attempt, story.status.restarts.counted, story.child.steps) == (2, 0, 200)
    story.complete()
    story.look(1)
    assert story.status.phase == "Succeeded"


def test_more_steps_of_a_suspended_run_wait() -> None:
    story = trained()
    story.complete()
    story.edit("hyperparameters", steps=200)
    story.edit("schedule", suspend=True)
    decided = story.look(1)
    assert (story.status.phase, decided.create) == ("Suspended", ())
    story.edit("schedule", suspend=False)
    story.look(1)
    assert story.status.attempt == 2


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_an_ended_run_is_left_alone(phase: str) -> None:
    story = trained()
    if phase == "Succeeded":
        story.complete()
    else:
        story.fail(ended(65), ended(82, 1))
    story.look(1)
    before = story.status
    assert before.phase == phase
    story.vanish()
    story.profile = None
    story.apis = Apis()
    story.edit("schedule", suspend=True)
    decided = story.look(1000)
    assert (decided.status, decided.create, decided.delete, decided.events) == (before, (), (), ())


def test_a_run_that_is_being_deleted_is_left_alone() -> None:
    story = trained()
    story.raw["metadata"]["deletionTimestamp"] = "2026-11-01T13:00:00Z"
    story.vanish()
    decided = story.look(5)
    assert (decided.status, decided.create, decided.delete, decided.events) == (story.status, (), (), ())
    assert decided.requeue_seconds is None
