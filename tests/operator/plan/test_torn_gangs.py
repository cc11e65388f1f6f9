"""A gang one of whose pods was replaced starts anew as a whole."""

from dataclasses import replace
from datetime import timedelta

import pytest

from run_stories import Story, trained


def gang(story: Story, *ages: float) -> None:
    """Pods of the newest child, made so many seconds ago."""
    story.run_pods()
    made = [story.now - timedelta(seconds=age) for age in ages]
    story.pods = tuple(replace(pod, created=time) for pod, time in zip(story.pods, made, strict=True))


def scheduled(**options: object) -> Story:
    """A run whose pods all got their nodes just now."""
    story = trained(**options)
    gang(story, 1, 1)
    story.look()
    return story


@pytest.mark.parametrize("jobset", [True, False], ids=["JobSet", "Job"])
def test_a_pod_that_is_replaced_alone_brings_the_whole_gang_down(jobset: bool) -> None:
    story = scheduled(jobset=jobset, retry={"backoffSeconds": 0})
    story.now += timedelta(seconds=100)
    gang(story, 101, 1)
    decided = story.look()
    assert [(ref.kind, ref.name) for ref in decided.delete] == [("JobSet" if jobset else "Job", "knight-1")]
    assert (story.status.phase, story.status.reason) == ("Recovering", "GangTorn")
    story.vanish()
    story.look(1)
    status = story.status
    assert (status.attempt, status.restarts.counted, status.attempts[0].reason) == (2, 1, "GangTorn")
    assert "knight-1-node-0-1 was replaced" in status.attempts[0].message


def test_a_gang_that_comes_anew_as_a_whole_is_none() -> None:
    story = scheduled()
    story.now += timedelta(seconds=100)
    gang(story, 2, 1)
    assert story.look().delete == ()


@pytest.mark.parametrize("late", [0, 29])
def test_clocks_may_differ(late: float) -> None:
    story = scheduled()
    story.now += timedelta(seconds=late)
    gang(story, late + 1, 0)
    assert story.look().delete == ()


def test_pods_that_come_one_after_the_other_before_all_have_nodes_are_no_torn_gang() -> None:
    """A quota may let them in one by one; the first waits for its peers at the rendezvous."""
    story = trained()
    gang(story, 600, 1)
    story.pods = (story.pods[0], replace(story.pods[1], node=None, running=False, phase="Pending"))
    story.look()
    gang(story, 630, 31)
    assert story.look(30).delete == ()


@pytest.mark.parametrize("facts", [{"deleting": True}, {"running": False, "exit_code": 75, "phase": "Failed"}])
def test_pods_that_leave_are_no_peers(facts: dict[str, object]) -> None:
    """Kueue has taken the quota back and given it again: those that are there are all new, some old ones are still seen."""
    story = scheduled()
    story.now += timedelta(seconds=100)
    gang(story, 101, 1)
    story.pods = (replace(story.pods[0], **facts), story.pods[1])  # type: ignore[arg-type]
    assert story.look().delete == ()
