"""Pods on nodes that do not answer: removed by force, no sooner than the cluster has given the node up, and the gang starts anew."""

from dataclasses import replace
from datetime import timedelta

import pytest

from run_stories import Story, ended, pod, trained


def cut_off(story: Story, *, grace: float = 0, lost: bool = True) -> None:
    """The node of pod 1 is dead, and its pod is to go."""
    by = story.now + timedelta(seconds=grace)
    story.pods = (story.pods[0], replace(story.pods[1], deleting=True, gone_by=by))
    story.lost_nodes = frozenset({"gpu-1"} if lost else ())


@pytest.mark.parametrize("jobset", [True, False], ids=["JobSet", "Job"])
def test_the_pod_goes_by_force_and_another_attempt_follows_that_does_not_count(jobset: bool) -> None:
    story = trained(jobset=jobset)
    cut_off(story)
    decided = story.look(31)
    assert [(ref.kind, ref.name) for ref in decided.delete] == [
        ("Pod", "knight-1-node-0-1"),
        ("JobSet" if jobset else "Job", "knight-1"),
    ]
    assert (story.status.phase, story.status.reason) == ("Recovering", "NodeLost")
    assert "node gpu-1 does not answer" in story.status.message
    assert ("Warning", "NodeLost") in [(event.type, event.reason) for event in decided.events]
    story.vanish()
    story.look(1)
    status = story.status
    assert (status.attempt, status.restarts.counted, status.restarts.uncounted) == (2, 0, 1)
    assert (status.attempts[0].reason, status.restarts.last_reason) == ("NodeLost", "NodeLost")


def test_nothing_is_forced_before_the_grace_is_long_over() -> None:
    story = trained()
    cut_off(story, grace=100)
    decided = story.look(0)
    assert (decided.delete, decided.requeue_seconds) == ((), 130)
    assert story.look(129).delete == ()
    assert story.look(1).delete != ()


def test_a_node_that_answers_is_given_its_time() -> None:
    """The pod may hang for other reasons: it is looked at again, and never removed by force."""
    story = trained()
    cut_off(story, lost=False)
    for _ in range(10):
        decided = story.look(600)
        assert (decided.delete, decided.requeue_seconds) == ((), 30)
    assert story.status.phase == "Running"


def test_a_pod_that_holds_up_the_end_of_a_failed_child_goes_as_well() -> None:
    """The peer that is left has failed with its Job; a JobSet waits for the last pod before it makes new ones."""
    story = trained()
    cut_off(story)
    stuck = story.pods[1]
    story.pods = (ended(82, 0, attempt=1), stuck)
    decided = story.look(31)
    assert ("Pod", stuck.uid) in [(ref.kind, ref.uid) for ref in decided.delete]


@pytest.mark.parametrize("how", ["suspended", "deleted", "failed"])
def test_a_run_that_is_to_end_anyway_is_not_held_up(how: str) -> None:
    story = trained()
    if how == "suspended":
        story.edit("schedule", suspend=True)
        story.look(1)
    if how == "deleted":
        story.raw["metadata"]["deletionTimestamp"] = "2026-11-01T12:00:00Z"
    if how == "failed":
        story.raw["status"]["phase"] = "Failed"
    cut_off(story)
    assert [ref.kind for ref in story.look(40).delete] == ["Pod"]


def test_a_pod_of_an_older_attempt_does_not_end_the_present_one() -> None:
    story = trained()
    old = pod(1, attempt=1, restart=0, deleting=True, gone_by=story.now)
    story.fail(ended(80), ended(82, 1))
    story.look(1)
    story.train()
    story.pods = (*story.pods, old)
    story.lost_nodes = frozenset({"gpu-1"})
    decided = story.look(60)
    assert [(ref.kind, ref.name) for ref in decided.delete] == [("Pod", old.name)]
    assert (story.status.phase, story.status.attempt) == ("Running", 2)


def test_an_operator_that_is_stopped_in_between_still_knows_why() -> None:
    story = trained()
    cut_off(story)
    story.look(31)
    story.vanish()
    story.lose_status(1)
    story.look(1)
    assert (story.status.attempts[0].reason, story.status.restarts.uncounted) == ("NodeLost", 1)
