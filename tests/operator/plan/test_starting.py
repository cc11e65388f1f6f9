"""Making an attempt: which objects, with which engine, and what may stand in its way."""

from dataclasses import replace

import pytest

from atelier_operator.observed import Apis, Obstacle, Quota
from atelier_operator.plan.waiting import times
from run_stories import Story, profile, trained

ENGINES = {
    "JobSet": (Apis(jobset=True), ["ConfigMap", "JobSet"], "jobset", "none", "Preparing"),
    "Job": (Apis(), ["ConfigMap", "Service", "Job"], "job", "none", "Preparing"),
    "JobSet in a queue": (Apis(jobset=True, kueue=True), ["ConfigMap", "JobSet"], "jobset", "kueue", "Queued"),
    "Job in a queue": (Apis(kueue=True), ["ConfigMap", "Service", "Job"], "job", "kueue", "Queued"),
}


@pytest.mark.parametrize(("apis", "kinds", "backend", "gang", "phase"), ENGINES.values(), ids=ENGINES)
def test_the_first_attempt_is_made_with_what_the_cluster_serves(
    apis: Apis, kinds: list[str], backend: str, gang: str, phase: str
) -> None:
    story = Story(schedule={"queue": "gpu"})
    story.apis = apis
    decided = story.look()
    assert [each["kind"] for each in decided.create] == kinds
    assert {each["metadata"]["name"] for each in decided.create} == {"knight-1"}
    status = story.status
    assert status.plan is not None
    assert (status.plan.backend, status.plan.gang, status.plan.world_size) == (backend, gang, 2)
    assert (status.phase, status.attempt, [record.number for record in status.attempts]) == (phase, 1, [1])
    assert status.store_uri == "s3://bucket/runs/art/knight-0a1b2c3d-0000-4000-8000-000000000000"
    assert [(event.type, event.reason) for event in decided.events] == [("Normal", "Starting")]


def test_the_status_says_what_goes_through_the_autoencoder_in_tiles() -> None:
    for tiling, tiled in (("auto", False), ("always", True)):
        story = Story(model={"autoencoderTiling": tiling})
        story.look()
        assert story.status.plan is not None
        assert (story.status.plan.tiled_encoding, story.status.plan.tiled_samples) == (tiled, tiled)


def test_the_profiles_queue_is_that_of_runs_that_name_none() -> None:
    story = Story(kueue=True)
    story.profile = profile(defaultQueue="shared")
    story.look()
    assert story.child.queue == "shared"


def test_a_live_run_keeps_its_engine_when_another_appears() -> None:
    story = trained(jobset=False)
    story.apis = Apis(jobset=True, kueue=True)
    decided = story.look(30)
    assert (decided.create, decided.delete, story.status.phase) == ((), (), "Running")


def test_an_object_of_another_owner_is_named_and_looked_at_again() -> None:
    story = Story()
    story.obstacle = Obstacle("JobSet knight-1")
    decided = story.look()
    assert (story.status.phase, story.status.reason, story.status.attempt) == ("Pending", "NameTaken", 0)
    assert "JobSet knight-1 exists and does not belong to this run" in story.status.message
    assert decided.requeue_seconds == 15
    assert decided.create == ()


def test_a_started_run_whose_next_name_is_taken_is_not_pending() -> None:
    story = trained(retry={"backoffSeconds": 0})
    story.vanish()
    story.obstacle = Obstacle("JobSet knight-2")
    story.look()
    assert (story.status.phase, story.status.reason) == ("Recovering", "NameTaken")


QUOTAS = {
    "room": ({"requests.nvidia.com/gpu": "4"}, {"requests.nvidia.com/gpu": "2"}, None),
    "taken by others": (
        {"requests.nvidia.com/gpu": "4"},
        {"requests.nvidia.com/gpu": "3"},
        "requests.nvidia.com/gpu: needs 2, ResourceQuota team has 1 of 4 left",
    ),
    "too small for ever": ({"requests.nvidia.com/gpu": "1"}, {}, "ResourceQuota team allows 1 at most"),
    "cpu": ({"cpu": "1500m"}, {}, "cpu: needs 2, ResourceQuota team allows 1500m at most"),
    "memory": ({"requests.memory": "20Gi"}, {"requests.memory": "6Gi"}, "requests.memory: needs 16Gi"),
    "memory in full": ({"requests.memory": "20Gi"}, {"requests.memory": "4Gi"}, None),
    "pods": ({"pods": "10"}, {"pods": "9"}, "pods: needs 2, ResourceQuota team has 1 of 10 left"),
    "what the run does not need": ({"services": "0"}, {}, None),
}


@pytest.mark.parametrize(("hard", "used", "lacking"), QUOTAS.values(), ids=QUOTAS)
def test_without_kueue_the_whole_gang_must_fit_into_the_quota(
    hard: dict[str, str], used: dict[str, str], lacking: str | None
) -> None:
    story = Story()
    story.quotas = (Quota("team", hard, used),)
    decided = story.look()
    if lacking is None:
        assert story.status.attempt == 1
        return
    assert (story.status.phase, story.status.reason, decided.create) == ("Queued", "WaitingForQuota", ())
    assert lacking in story.status.message
    assert decided.requeue_seconds == 15


@pytest.mark.parametrize("kueue", [True, False])
def test_a_quota_for_some_pods_only_and_one_behind_kueue_are_left_to_others(kueue: bool) -> None:
    story = Story(kueue=kueue, schedule={"queue": "gpu"})
    story.quotas = (Quota("team", {"pods": "0"}, {}, scoped=not kueue),)
    story.look()
    assert story.status.attempt == 1


def test_a_quota_with_scopes_is_read_as_such() -> None:
    raw = {"metadata": {"name": "team"}, "spec": {"scopes": ["BestEffort"]}, "status": {"hard": {"pods": "1"}}}
    assert Quota.of(raw) == Quota("team", {"pods": "1"}, {}, scoped=True)


TIMES = {"whole": ("4", 2, "8"), "binary": ("8Gi", 4, "32Gi"), "milli": ("500m", 3, "1500m"), "part": ("0.5", 3, "1.5")}


@pytest.mark.parametrize(("text", "factor", "expected"), TIMES.values(), ids=TIMES)
def test_a_quantity_times_the_nodes(text: str, factor: int, expected: str) -> None:
    assert times(text, factor) == expected


# --- after a crash ----------------------------------------------------------------------------------------------------


def test_a_child_made_before_a_crash_is_adopted_with_its_plan() -> None:
    story = Story()
    story.lose_status()
    assert story.status.attempt == 0
    decided = story.look(20)
    assert decided.create == ()
    status = story.status
    assert (status.attempt, [record.number for record in status.attempts]) == (1, [1])
    assert status.attempts[0].start == "2026-11-01T12:00:00Z"
    assert status.plan is not None
    assert (status.plan.backend, status.plan.strategy) == ("jobset", "ddp")
    assert status.store_uri is not None


def test_a_second_attempt_made_before_a_crash_is_adopted_and_the_first_is_charged() -> None:
    story = trained(jobset=False, retry={"backoffSeconds": 0})
    story.fail(message="Container trainer for pod art/x failed with exit code 82 matching FailJob rule at index 1")
    story.lose_status(60)
    assert (story.status.attempt, max(story.children)) == (1, 2)
    decided = story.look(60)
    status = story.status
    assert (decided.create, status.attempt) == ((), 2)
    assert [(record.number, record.reason) for record in status.attempts] == [(1, "CollectiveTimeout"), (2, None)]
    assert (status.restarts.counted, status.restarts.last_exit_code) == (1, 82)


def test_an_adopted_attempt_takes_the_plan_it_was_made_with() -> None:
    story = trained(jobset=False)
    story.fail(message="Container trainer for pod art/x failed with exit code 80 matching FailJob rule at index 1")
    first = story.status.plan
    story.lose_status(60)
    story.look(60)
    second = story.status.plan
    assert first is not None
    assert second is not None
    assert second.predicted_peak_memory_bytes < first.predicted_peak_memory_bytes
    assert story.status.attempts[0].reason == "OutOfMemory"


def test_an_attempt_made_for_more_steps_before_a_crash_closes_the_completed_one() -> None:
    story = trained()
    story.edit("hyperparameters", steps=200)
    story.complete()
    story.lose_status()
    story.look(5)
    assert [record.reason for record in story.status.attempts] == ["Completed", None]
    assert story.status.restarts.counted == 0


def test_a_lost_first_child_is_charged_when_the_second_is_adopted() -> None:
    story = trained(retry={"backoffSeconds": 0})
    story.vanish()
    story.lose_status(5)
    story.look(5)
    assert [record.reason for record in story.status.attempts] == ["Deleted", None]
    assert story.status.restarts.counted == 1


def test_an_attempt_resumed_before_a_crash_is_adopted_without_a_charge() -> None:
    story = trained()
    story.edit("schedule", suspend=True)
    story.look(5)
    story.edit("schedule", suspend=False)
    story.vanish()
    story.lose_status(5)
    story.look(5)
    assert [(record.number, record.reason) for record in story.status.attempts] == [(1, "Suspended"), (2, None)]
    assert (story.status.restarts.counted, story.status.restarts.uncounted) == (0, 0)


def test_two_attempts_never_live_at_once() -> None:
    story = trained(retry={"backoffSeconds": 0})
    story.children[2] = replace(story.child, attempt=2, name="knight-2", uid="other", finished="Failed")
    story.look()
    assert story.children[1].deleting
    assert (max(story.children), story.status.phase, story.status.reason) == (2, "Recovering", "Stopping")
    del story.children[1]
    story.look(5)
    assert (max(story.children), story.status.message) == (2, "2 pods of an earlier attempt are stopping")
    story.pods = ()
    story.look(5)
    assert max(story.children) == 3
