"""Times that end a run, or delete it after its end."""

from typing import Any

import pytest

from run_stories import UID, Story, ended, trained

DEADLINES: dict[str, tuple[dict[str, Any], bool, float, str]] = {
    "active deadline": ({"activeDeadlineSeconds": 60}, True, 65, "DeadlineExceeded"),
    "start timeout": ({"startTimeoutSeconds": 60}, False, 60, "StartTimeout"),
}


@pytest.mark.parametrize(("schedule", "starts", "at", "reason"), DEADLINES.values(), ids=DEADLINES)
def test_a_deadline_stops_the_child_and_ends_the_run(
    schedule: dict[str, Any], starts: bool, at: float, reason: str
) -> None:
    story = Story(schedule=schedule)
    assert story.look().requeue_seconds == (None if starts else 60)
    if starts:
        story.train()
    decided = story.look(5)
    assert decided.requeue_seconds == (60 if starts else 55)
    assert story.look(at - 5.5).delete == ()
    decided = story.look(0.5)
    assert (story.status.phase, story.status.reason) == ("Failed", reason)
    assert [each.name for each in decided.delete] == ["knight-1"]


def test_a_run_that_has_started_has_no_start_timeout() -> None:
    story = trained(schedule={"startTimeoutSeconds": 60})
    story.look(1000)
    assert story.status.phase == "Running"


def test_a_deadline_that_is_over_makes_no_attempt() -> None:
    story = trained(schedule={"activeDeadlineSeconds": 60}, retry={"backoffSeconds": 0})
    story.fail(ended(75), ended(75, 1))
    decided = story.look(100)
    assert (story.status.reason, decided.create) == ("DeadlineExceeded", ())


TTLS = {"none": (None, None, 0), "later": (100, 95.0, 0), "now": (5, None, 1), "at once": (0, None, 1)}


@pytest.mark.parametrize(("seconds", "again", "deleted"), TTLS.values(), ids=TTLS)
def test_an_ended_run_is_deleted_when_its_time_is_over(seconds: int | None, again: float | None, deleted: int) -> None:
    story = trained(schedule={"ttlSecondsAfterFinished": seconds})
    story.complete()
    story.look(1)
    decided = story.look(5)
    assert decided.requeue_seconds == again
    assert [(each.kind, each.uid) for each in decided.delete] == [("TrainingRun", UID)] * deleted
