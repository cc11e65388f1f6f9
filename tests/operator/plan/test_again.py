"""Another attempt: what counts, how long the pause is, which plan it gets, and when it is the last."""

import pytest

from atelier_operator.observed import Quota
from run_stories import Story, ended, trained


def test_a_deleted_child_counts_once_and_the_next_comes_after_a_pause() -> None:
    story = trained(retry={"backoffSeconds": 10})
    story.change(deleting=True)
    story.look(1)
    assert (story.status.phase, story.status.restarts.counted) == ("Recovering", 0)
    story.vanish()
    decided = story.look(1)
    assert (story.status.phase, story.status.reason, decided.requeue_seconds) == ("Recovering", "Deleted", 10)
    assert story.status.restarts.counted == 1
    assert story.look(4).requeue_seconds == 6
    assert story.look(5.5).create == ()
    story.look(0.5)
    assert (story.status.attempt, story.status.restarts.counted) == (2, 1)


def test_pods_that_outlive_their_child_are_waited_for() -> None:
    """It was deleted without them (`kubectl delete jobset` does so): they train on until the garbage collector has found them."""
    story = trained(retry={"backoffSeconds": 0})
    left = story.pods
    story.vanish()
    story.pods = left
    for _ in range(3):
        story.look(1)
        assert (story.status.phase, story.status.reason, story.status.attempt) == ("Recovering", "Stopping", 1)
        assert story.status.restarts.counted == 1
    story.pods = tuple(ended(75, pod.index, attempt=1) for pod in left)
    story.look(1)
    assert (story.status.attempt, story.status.restarts.counted) == (2, 1)


@pytest.mark.parametrize("jobset", [True, False], ids=["JobSet", "Job"])
def test_the_pause_doubles_with_each_restart_that_counts(jobset: bool) -> None:
    story = Story(jobset=jobset, retry={"backoffSeconds": 10, "maxRestarts": 100})
    story.look()
    pauses = []
    for _ in range(8):
        story.train()
        story.look(1)
        story.fail(ended(82), ended(82, 1))
        pauses.append(story.look(0).requeue_seconds)
        story.look(601)
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600]


def test_a_clock_that_was_ahead_does_not_make_the_pause_longer() -> None:
    story = trained(jobset=False, retry={"backoffSeconds": 10})
    story.fail(ended(82), ended(82, 1))
    story.look(600)
    assert story.look(-300).requeue_seconds == 10


def test_a_store_that_is_down_is_not_hammered() -> None:
    story = trained(jobset=False, retry={"backoffSeconds": 10})
    story.fail(ended(69), ended(69, 1))
    assert story.look(1).requeue_seconds == 10
    assert (story.status.restarts.counted, story.status.restarts.uncounted) == (0, 1)


def test_restarts_are_used_up() -> None:
    story = Story(jobset=False, retry={"backoffSeconds": 0, "maxRestarts": 2})
    story.look()
    for _ in range(3):
        story.train()
        story.look(1)
        story.fail(ended(82), ended(82, 1))
        story.look(1)
    status = story.status
    assert (status.phase, status.reason, status.attempt, status.restarts.counted) == ("Failed", "MaxRestarts", 3, 2)
    assert "2 restarts (spec.retry.maxRestarts) are used up" in status.message


def test_a_jobset_has_used_up_its_own_restarts() -> None:
    story = trained(retry={"maxRestarts": 3})
    story.fail(ended(82), ended(82, 1), restarts=4, restarts_counted=3, reason="ReachedMaxRestarts")
    story.look(1)
    assert (story.status.phase, story.status.reason) == ("Failed", "MaxRestarts")
    assert (story.status.restarts.counted, story.status.restarts.uncounted) == (3, 1)


def test_restarts_that_were_added_since_the_jobset_was_made_are_used() -> None:
    """A JobSet's failurePolicy cannot change."""
    story = trained(retry={"maxRestarts": 1, "backoffSeconds": 0})
    story.edit("retry", maxRestarts=3)
    story.fail(ended(82), ended(82, 1), restarts=1, restarts_counted=1, reason="ReachedMaxRestarts")
    story.look(1)
    assert (story.status.attempt, story.status.restarts.counted) == (2, 2)
    assert story.created[-1]["spec"]["failurePolicy"]["maxRestarts"] == 1


@pytest.mark.parametrize("code", [75, 83], ids=["stopped", "GPU fault"])
def test_restarts_that_do_not_count_have_a_cap_of_their_own(code: int) -> None:
    """Far more of them than the status has records of attempts."""
    story = Story(jobset=False, retry={"maxRestarts": 0})
    story.look()
    for _ in range(100):
        story.fail(ended(code), ended(code, 1))
        story.look(1)
    assert (story.status.attempt, story.status.restarts.uncounted, len(story.status.attempts)) == (101, 100, 20)
    story.fail(ended(code), ended(code, 1))
    story.look(1)
    assert (story.status.phase, story.status.reason) == ("Failed", "MaxRestarts")


def test_restarts_that_count_are_counted_beyond_the_records_of_attempts() -> None:
    story = Story(jobset=False, retry={"maxRestarts": 30, "backoffSeconds": 0})
    story.look()
    for _ in range(31):
        story.fail(ended(82), ended(82, 1))
        story.look(1)
    assert (story.status.phase, story.status.restarts.counted, story.status.attempt) == ("Failed", 30, 31)


def test_a_jobset_that_restarts_for_ever_is_ended() -> None:
    story = trained()
    story.change(restarts=101)
    decided = story.look(1)
    assert (story.status.phase, story.status.reason) == ("Failed", "MaxRestarts")
    assert [each.name for each in decided.delete] == ["knight-1"]


def test_a_gpu_fault_keeps_the_next_attempt_off_the_node() -> None:
    story = trained()
    story.fail(ended(83, 1), ended(82, 0))
    story.look(1)
    assert story.status.excluded_nodes == ["gpu-1"]
    template = story.created[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert "gpu-1" in str(template["spec"]["affinity"])
    story.train()
    story.look(5)
    assert (story.status.excluded_nodes, story.status.restarts.counted) == (["gpu-1"], 0)


def test_out_of_memory_takes_a_smaller_plan_twice_at_most() -> None:
    story = Story(hyperparameters={"globalBatchSize": 16})
    peaks = []
    story.look()
    for _ in range(3):
        assert story.status.plan is not None
        peaks.append(story.status.plan.predicted_peak_memory_bytes)
        story.fail(ended(80), ended(82, 1))
        story.look(1)
    assert peaks == sorted(set(peaks), reverse=True)
    status = story.status
    assert (status.phase, status.reason, status.attempt) == ("Failed", "OutOfMemory", 3)
    assert (status.restarts.counted, status.restarts.uncounted) == (0, 2)
    assert "2 plans that were to need less did not help" in status.message


def test_out_of_memory_with_nothing_smaller_fails_at_once() -> None:
    fixed = {"microBatchSize": 1, "gradientCheckpointing": True, "globalBatchSize": 2}
    story = trained(hyperparameters=fixed, parallelism={"strategy": "ddp"})
    story.fail(ended(80), ended(82, 1))
    story.look(1)
    assert (story.status.phase, story.status.reason) == ("Failed", "OutOfMemory")
    assert "no other plan of this spec needs less memory" in story.status.message


def test_a_smaller_plan_is_kept_by_later_attempts() -> None:
    story = trained(retry={"backoffSeconds": 0})
    story.fail(ended(80), ended(82, 1))
    story.look(1)
    smaller = story.status.plan
    story.fail(ended(82), ended(82, 1))
    story.look(1)
    assert (story.status.attempt, story.status.plan) == (3, smaller)


@pytest.mark.parametrize("code", [80, 83])
def test_a_restart_that_waits_for_quota_is_charged_once(code: int) -> None:
    story = trained()
    story.fail(ended(code), ended(82, 1))
    story.quotas = (Quota("team", {"pods": "1"}, {}),)
    for _ in range(4):
        story.look(15)
    assert (story.status.phase, story.status.restarts.uncounted, max(story.children)) == ("Queued", 1, 1)
    story.quotas = ()
    story.look(15)
    assert (max(story.children), story.status.restarts.uncounted) == (2, 1)
