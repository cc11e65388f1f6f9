"""Conditions as values."""

from datetime import timedelta

from atelier_api.v1alpha1.conditions import Condition, ConditionType, Reason
from atelier_operator.plan.conditions import Said
from run_stories import START, trained


def said(
    *verdicts: tuple[ConditionType, str, Reason], later: float = 0, before: tuple[Condition, ...] = ()
) -> list[Condition]:
    """The conditions after a pass that has said these."""
    passed = Said(7, START + timedelta(seconds=later))
    for kind, verdict, reason in verdicts:
        passed.say(kind, verdict, reason, "because")  # type: ignore[arg-type]
    return passed.over(before)


RUNNING = (ConditionType.RUNNING, "True", Reason.TRAINING)


def test_a_condition_keeps_the_time_of_its_last_change() -> None:
    first = tuple(said(RUNNING))
    (same,) = said((ConditionType.RUNNING, "True", Reason.ACTIVE), later=60, before=first)
    assert (same.last_transition_time, same.reason) == ("2026-11-01T12:00:00Z", "Active")
    (changed,) = said((ConditionType.RUNNING, "False", Reason.ENDED), later=60, before=first)
    assert (changed.last_transition_time, changed.observed_generation) == ("2026-11-01T12:01:00Z", 7)


def test_a_later_statement_replaces_an_earlier_one_and_the_others_stay_in_their_order() -> None:
    before = tuple(said((ConditionType.FAILED, "False", Reason.ACTIVE), (ConditionType.ACCEPTED, "True", Reason.VALID)))
    found = said(RUNNING, (ConditionType.RUNNING, "False", Reason.ENDED), before=before)
    assert [(each.type, each.status) for each in found] == [
        ("Accepted", "True"),
        ("Running", "False"),
        ("Failed", "False"),
    ]


def test_conditions_of_another_version_are_kept_at_the_end() -> None:
    newer = said(RUNNING)[0].model_copy(update={"type": "Blessed"})
    assert [each.type for each in said(RUNNING, before=(newer,))] == ["Running", "Blessed"]


def test_a_long_message_is_cut() -> None:
    passed = Said(1, START)
    passed.say(ConditionType.RUNNING, "False", Reason.ENDED, "x" * 9000)
    assert len(passed.over(())[0].message) == 2000


def test_a_run_that_trains_on_has_trained_since_it_began() -> None:
    story = trained()
    began = story.condition("Running").last_transition_time
    story.train(50)
    story.look(600)
    assert (story.condition("Running").last_transition_time, began) == ("2026-11-01T12:00:05Z", "2026-11-01T12:00:05Z")
