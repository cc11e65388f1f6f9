"""The operator is killed at every one of its writes, and the run comes to the same end."""

import asyncio
from functools import cache
from typing import Any

import pytest

from atelier_operator.cluster import ApiError
from operator_life import Killed, Life, chapters

Object = dict[str, Any]

BLOCKS: dict[str, Object] = {"schedule": {"ttlSecondsAfterFinished": 600}, "retry": {"backoffSeconds": 0}}
TIMES = {"startTime", "completionTime", "start", "end", "lastTransitionTime", "measuredAt", "gpuSeconds"}


pytestmark = pytest.mark.sweep


class Blow:
    """Strikes once, at the operator's write `number`: before it, after it but before its answer, or when the operator does
    anything else after the answer."""

    def __init__(self, number: int, moment: str, error: BaseException) -> None:
        self._number, self._moment, self._error = number, moment, error
        self._writes = 0
        self._answered = False
        self.struck = False

    def __call__(self, moment: str, verb: str, kind: str) -> None:
        if self.struck:
            return
        write = verb != "GET"
        if moment == "asked":
            self._writes += write
            if self._answered or (self._moment == "before" and write and self._writes == self._number):
                self._strike()
        elif self._writes == self._number:
            self._answered = self._moment == "answered"
            if self._moment == "stored":
                self._strike()

    def _strike(self) -> None:
        self.struck = True
        raise self._error


def timeless(value: Any) -> Any:
    """A status without its times."""
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def live(life: Life, blow: Blow | None = None, late: dict[str, int] | None = None) -> list[Object]:
    """The whole life; gives the status at the end of each chapter."""

    async def tell() -> list[Object]:
        told = []
        if late:
            life.start(late)
        life.cluster.interrupt = blow or (lambda *_: None)
        for chapter in chapters(life):
            chapter()
            await life.rest()
            told.append(timeless(life.status))
        return told

    return asyncio.run(tell())


def left(life: Life) -> dict[str, int]:
    """Objects that are there in the end."""
    kinds = ("TrainingRun", "ConfigMap", "Service", "JobSet", "Job", "Pod")
    return {kind: len(life.cluster.all(kind)) for kind in kinds}


def made(life: Life) -> dict[tuple[str, str], int]:
    """How often each object was made, except for events."""
    return {what: number for what, number in life.cluster.made.items() if what[0] != "Event"}


def never_back(life: Life) -> None:
    """What the status has said stays said: attempts, restarts, ends."""
    for old, new in zip(life.cluster.statuses, life.cluster.statuses[1:], strict=False):
        assert new["attempt"] >= old["attempt"]
        assert new["restarts"]["counted"] >= old["restarts"]["counted"]
        assert new["restarts"]["uncounted"] >= old["restarts"]["uncounted"]
        assert (new.get("cost") or {}).get("gpuSeconds", 0) >= (old.get("cost") or {}).get("gpuSeconds", 0)
        ends = {each["number"]: each.get("end") for each in new["attempts"]}
        assert all(ends[each["number"]] == each["end"] for each in old["attempts"] if "end" in each)
        assert old["phase"] not in ("Succeeded", "Failed") or new == old


@cache
def expectation(jobset: bool) -> tuple[Life, list[Object]]:
    """A life in which nothing happens to the operator, and what it tells."""
    undisturbed = Life(jobset=jobset, **BLOCKS)
    return undisturbed, live(undisturbed)


def same(life: Life, told: list[Object], jobset: bool) -> None:
    """The life went as the undisturbed one."""
    undisturbed, expected = expectation(jobset)
    for number, (one, other) in enumerate(zip(told, expected, strict=True)):
        assert one == other, f"after chapter {number}"
    assert left(life) == left(undisturbed) == dict.fromkeys(left(life), 0)
    assert made(life) == made(undisturbed)
    assert set(made(life).values()) == {1}
    never_back(life)


def writes() -> int:
    """The operator's writes in an undisturbed life."""
    life = Life(**BLOCKS)
    live(life)
    return sum(verb != "GET" for verb, _, _ in life.cluster.calls)


WRITES = writes()


def test_an_undisturbed_life_makes_three_attempts_and_every_kind_of_write() -> None:
    life = Life(**BLOCKS)
    told = live(life)
    phases = [status["phase"] for status in told]
    assert phases == [
        *("Preparing", "Running", "Recovering", "Running", "Recovering", "Running"),
        *("Suspended", "Suspended", "Recovering", "Running", "Succeeded", "Succeeded", "Succeeded"),
    ]
    assert [each["reason"] for each in told[-1]["attempts"]] == ["OutOfMemory", "Suspended", "Completed"]
    assert (told[-1]["restarts"]["counted"], told[-1]["restarts"]["uncounted"]) == (1, 1)
    assert {verb for verb, _, _ in life.cluster.calls} == {"GET", "POST", "PATCH", "DELETE"}
    assert (WRITES, life.agents.forgotten) == (WRITES, [("art", "knight")])
    assert WRITES > 30
    same(life, told, jobset=True)


@pytest.mark.parametrize("moment", ["before", "stored", "answered"])
def test_an_operator_that_is_killed_at_any_write_is_followed_by_one_that_goes_on(moment: str) -> None:
    for number in range(1, WRITES + 1):
        life = Life(**BLOCKS)
        blow = Blow(number, moment, Killed())
        told = live(life, blow)
        # After the answer to the very last write nothing more is asked.
        assert life.killed == blow.struck == (moment != "answered" or number < WRITES), number
        same(life, told, jobset=True)


@pytest.mark.parametrize(
    ("moment", "error"),
    [("before", ApiError(500, "etcd is away")), ("stored", ApiError(0, "no answer"))],
    ids=["refused for now", "the answer is lost"],
)
def test_an_operator_whose_write_fails_at_any_point_goes_on_itself(moment: str, error: ApiError) -> None:
    for number in range(1, WRITES + 1):
        life = Life(**BLOCKS)
        life.forgives = True
        blow = Blow(number, moment, error)
        told = live(life, blow)
        assert (blow.struck, life.killed) == (True, 0)
        same(life, told, jobset=True)


LATE: dict[str, dict[str, int]] = {
    "everything": {"TrainingRun": 3, "JobSet": 3, "Pod": 3},
    "runs": {"TrainingRun": 6},
    "children": {"JobSet": 6},
    "pods": {"Pod": 6},
    "pods, for very long": {"Pod": 30},
    "runs and pods": {"TrainingRun": 2, "Pod": 5},
    "children more than runs": {"TrainingRun": 2, "JobSet": 7},
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_watches_that_are_late_change_nothing(late: dict[str, int]) -> None:
    life = Life(**BLOCKS)
    same(life, live(life, late=late), jobset=True)
