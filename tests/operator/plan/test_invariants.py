"""What holds from any status, whatever is seen of children and pods (hypothesis)."""

import copy
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atelier_api.progress import CheckpointReport, FunnelReport, Progress
from atelier_api.v1alpha1.conditions import ConditionType
from atelier_api.v1alpha1.status import RunStatus
from atelier_operator.observed import Apis, Child, Observed, Obstacle, Pod, Quota, Run
from atelier_operator.plan import Plan, plan
from run_stories import START, Story, ended, pod, profile, raw_run, workload

PHASES = (
    *("Pending", "Queued", "Preparing", "Running", "Suspended", "Recovering", "Publishing"),
    *("Succeeded", "Failed"),
)
REASONS = st.sampled_from([None, "Suspended", "Deleted", "OutOfMemory", "CollectiveTimeout", "Completed", "Stopped"])
TIMES = st.sampled_from(["2026-11-01T11:59:00Z", "2026-11-01T12:10:00Z", "no time", ""])
COUNTS = st.sampled_from([0, 0, 1, 3, 100, 101])
NUMBERS = st.sampled_from([0, -1, 1, 10, 2**70])
EXIT = st.sampled_from([0, 1, 64, 65, 69, 70, 75, 77, 80, 81, 82, 83, 137])
ADOPTED = Story().look().status.model_dump(mode="json", by_alias=True, exclude_none=True)

quick = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def statuses(draw: st.DrawFn) -> dict[str, Any]:
    """Statuses of the wire, with attempts in order."""
    numbers = sorted(draw(st.sets(st.integers(1, 4), max_size=3)))
    records = []
    for number in numbers:
        record: dict[str, Any] = {"number": number, "start": draw(TIMES), "counted": draw(COUNTS)}
        record |= {"uncounted": draw(COUNTS)}
        if number != numbers[-1] or draw(st.booleans()):
            record |= {"end": draw(TIMES), "reason": draw(REASONS)}
        records.append({name: value for name, value in record.items() if value is not None})
    status = copy.deepcopy(ADOPTED) if draw(st.booleans()) else {}
    status |= {"phase": draw(st.sampled_from(PHASES)), "attempts": records, "conditions": []}
    status |= {"attempt": draw(st.integers(0, 4)), "restarts": {"counted": draw(COUNTS), "uncounted": draw(COUNTS)}}
    for name in ("startTime", "completionTime"):
        if draw(st.booleans()):
            status[name] = draw(TIMES)
    return status


@st.composite
def children(draw: st.DrawFn) -> tuple[Child, ...]:
    found = []
    for attempt in sorted(draw(st.sets(st.integers(0, 4), max_size=3))):
        finished = draw(st.sampled_from([None, None, "Completed", "Failed"]))
        restarts = draw(COUNTS)
        found.append(
            Child(
                backend=draw(st.sampled_from(["jobset", "job"])),
                name=f"knight-{attempt}",
                uid=f"uid-{attempt}",
                attempt=attempt,
                created=draw(st.sampled_from([None, START])),
                deleting=draw(st.booleans()),
                suspended=draw(st.booleans()),
                queue=draw(st.sampled_from([None, "gpu"])),
                steps=draw(st.sampled_from([0, 50, 100, 200])),
                finished=finished,
                finished_at=draw(st.sampled_from([None, START, START + timedelta(minutes=5)])),
                reason=draw(st.sampled_from(["", "FailJobSetFailurePolicyAction"])),
                message=draw(st.sampled_from(["", "failed with exit code 80 matching", "x" * 5000])),
                restarts=restarts,
                restarts_counted=draw(st.integers(0, restarts)),
            )
        )
    return tuple(found)


@st.composite
def pods(draw: st.DrawFn) -> tuple[Pod, ...]:
    found = []
    for index in range(draw(st.integers(0, 3))):
        facts = {
            "attempt": draw(st.integers(0, 4)),
            "restart": draw(st.integers(0, 1)),
            "disrupted": draw(st.booleans()),
            "node": draw(st.sampled_from([None, "gpu-1"])),
        }
        end = draw(st.booleans())
        found.append(
            ended(draw(EXIT), index, said="y" * 4000, **facts) if end else pod(index, **facts, waiting="ErrImagePull")
        )
    return tuple(found)


@st.composite
def progress(draw: st.DrawFn) -> Progress | None:
    """What a pod may say, sound or not: types are checked where it is read, and no more."""
    if draw(st.booleans()):
        return None
    number = draw(NUMBERS)
    real = draw(st.sampled_from([None, 0.5, float("nan"), float("inf"), -1e300]))
    return Progress(
        stage=draw(st.sampled_from(["Preparing", "Training", "Publishing", "Stopped", "Failed"])),
        detail="z" * draw(st.sampled_from([0, 9, 60000])),
        step=number,
        total_steps=draw(NUMBERS),
        loss=real,
        samples_per_second=real,
        eta_seconds=real,
        peak_memory_bytes=number,
        checkpoint=draw(
            st.sampled_from(
                [
                    None,
                    CheckpointReport(
                        step=number, manifest="m", size_bytes=number, manifest_sha256="a" * 99, time="t" * 99
                    ),
                    CheckpointReport(step=1, manifest="m" * 9999, size_bytes=1, manifest_sha256="", time=""),
                ]
            )
        ),
        funnel=FunnelReport(found=number, kept=number),
        samples=["s" * draw(st.sampled_from([1, 9999]))] * draw(st.sampled_from([0, 99])),
        updated_at="u" * 99,
    )


@st.composite
def runs(draw: st.DrawFn) -> Run:
    raw = raw_run(
        draw(statuses()),
        schedule={
            "suspend": draw(st.booleans()),
            "activeDeadlineSeconds": draw(st.sampled_from([None, 60])),
            "ttlSecondsAfterFinished": draw(st.sampled_from([None, 0, 600])),
        },
        retry={"backoffSeconds": draw(st.sampled_from([0, 30])), "maxRestarts": draw(st.sampled_from([0, 3]))},
        hyperparameters={"steps": draw(st.sampled_from([0, 100, 200]))},
    )
    if draw(st.integers(0, 9)) == 0:
        raw["metadata"]["deletionTimestamp"] = "2026-11-01T12:00:00Z"
    return Run.of(raw)


@st.composite
def views(draw: st.DrawFn) -> Observed:
    waits = draw(
        st.sampled_from([None, workload(), workload(evicted="Preempted"), workload(reserved=True, admitted=True)])
    )
    return Observed(
        apis=Apis(draw(st.booleans()), draw(st.booleans())),
        profile=draw(st.sampled_from([None, profile(), profile()])),
        children=draw(children()),
        pods=draw(pods()),
        workload=waits,
        waiting=(workload(),),
        quotas=draw(st.sampled_from([(), (Quota("q", {"pods": "1"}, {}),)])),
        progress=draw(progress()),
        obstacle=draw(st.sampled_from([None, None, Obstacle("JobSet knight-9"), Obstacle("JobSet knight-9", "no")])),
    )


def verdict(status: RunStatus, kind: ConditionType) -> str:
    return next((each.status for each in status.conditions if each.type == kind), "Unknown")


def made(decided: Plan) -> list[int]:
    """Attempts whose child a plan makes."""
    kinds = ("JobSet", "Job")
    return [int(each["metadata"]["labels"]["atelier.dev/attempt"]) for each in decided.create if each["kind"] in kinds]


@quick
@given(runs(), views(), st.sampled_from([0, 60, 100000]))
def test_the_invariants_of_a_run(run: Run, seen: Observed, later: int) -> None:
    decided = plan(run, seen, START + timedelta(seconds=later))
    status = decided.status
    RunStatus.model_validate(status.model_dump(mode="json", by_alias=True, exclude_none=True))

    assert (verdict(status, ConditionType.SUCCEEDED), verdict(status, ConditionType.FAILED)) != ("True", "True")
    assert status.attempt >= run.status.attempt
    assert status.restarts.counted >= run.status.restarts.counted
    assert status.restarts.uncounted >= run.status.restarts.uncounted
    if run.deleting or run.terminal:
        assert (status, decided.create, decided.events) == (run.status, (), ())
        assert all(each.kind == "TrainingRun" for each in decided.delete)
    attempts = [child.attempt for child in seen.children]
    assert len(made(decided)) <= 1
    for number in made(decided):
        assert number not in attempts
        assert number == status.attempt
        assert all(child.finished for child in seen.children if child.attempt > 0), "two attempts at once"
    removed = {each.uid for each in decided.delete}
    assert not removed & {child.uid for child in seen.children if child.deleting}, "deleted once"


@quick
@given(runs(), views())
def test_a_pass_over_its_own_result_changes_nothing(run: Run, seen: Observed) -> None:
    """Once what it has made and deleted is seen. Otherwise the operator would never rest."""
    now = START + timedelta(seconds=60)
    story = Story()
    story.raw = raw_run()
    story.raw["spec"] = dict(run.document["spec"])
    story.raw["status"] = run.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    story.now, story.apis, story.profile = now, seen.apis, seen.profile
    story.children = {child.attempt: child for child in seen.children}
    story.pods, story.workload, story.waiting = seen.pods, seen.workload, seen.waiting
    story.quotas, story.progress, story.obstacle = seen.quotas, seen.progress, seen.obstacle
    for _ in range(4):
        story.look()
    decided = story.look()
    assert decided.status == Run.of(story.raw).status
    again = plan(Run.of(story.raw), story.seen, story.now)
    assert again.status == Run.of(story.raw).status
    assert (again.create, again.events) == ((), ())


@pytest.mark.parametrize(
    "bad", [{"phase": "Sleeping"}, {"attempts": [{"number": "x"}]}, {"plan": {"backend": "slurm"}}]
)
def test_a_status_of_another_version_is_read_as_far_as_it_can_be(bad: dict[str, Any]) -> None:
    run = Run.of(raw_run({"phase": "Failed", "reason": "DataError", "attempt": 3, "newer": {"a": 1}} | bad))
    assert (run.status.reason, run.status.attempt) == ("DataError", 3)
    assert run.terminal is ("phase" not in bad)
