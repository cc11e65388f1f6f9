"""Why a child has failed: attribution over its pods, and what each cause does to the run."""

from dataclasses import replace

import pytest

from atelier_api.exit_codes import MEANINGS, ExitCode
from atelier_api.result import AgentResult
from atelier_api.v1alpha1.conditions import Reason
from atelier_operator.exit_rules import FINAL_CODES, RULES, UNCOUNTED_CODES
from atelier_operator.observed import Child, Pod
from atelier_operator.plan.ending import ending, of_pods
from run_stories import Story, ended, pod, trained, workload

CAUSES: dict[str, tuple[tuple[Pod, ...], str, str, int | None, str | None]] = {
    "out of memory, peers that lost it before": (
        (ended(82, 0, at=1), ended(80, 1, at=2)),
        "replan",
        "OutOfMemory",
        80,
        "gpu-1",
    ),
    "a GPU fault among peers": (
        (ended(82, 0), ended(82, 1), ended(83, 2, at=5)),
        "avoid-node",
        "GpuFault",
        83,
        "gpu-2",
    ),
    "two that say something: the earlier": ((ended(70, 0, at=9), ended(81, 1, at=3)), "fail", "Diverged", 81, "gpu-1"),
    "stopped, then its peers lost it": (
        (ended(82, 0, at=9), ended(75, 1, at=3)),
        "restart-uncounted",
        "Stopped",
        75,
        "gpu-1",
    ),
    "lost its peers, which were then stopped": (
        (ended(82, 0, at=3), ended(75, 1, at=9)),
        "restart",
        "CollectiveTimeout",
        82,
        "gpu-0",
    ),
    "killed by the kernel, peers lost it": (
        (ended(82, 0, at=1), ended(137, 1, at=2, exit_reason="OOMKilled")),
        "restart",
        "BackendError",
        137,
        "gpu-1",
    ),
    "killed at the end of its grace, the others left in time": (
        (ended(75, 0, at=10), ended(137, 1, at=30, exit_reason="Error")),
        "restart-uncounted",
        "Stopped",
        75,
        "gpu-0",
    ),
    "a crash, then its peers lost it": (
        (ended(139, 0, at=1), ended(82, 1, at=60)),
        "restart",
        "BackendError",
        139,
        "gpu-0",
    ),
    "evicted, its peers lost it": (
        (ended(82, 0, at=1), ended(75, 1, at=2, disrupted=True)),
        "restart-uncounted",
        "Preempted",
        75,
        "gpu-1",
    ),
    "evicted before its container ran": (
        (pod(0), pod(1, phase="Failed", running=False, disrupted=True, failure="low on memory")),
        "restart-uncounted",
        "Preempted",
        None,
        "gpu-1",
    ),
    "failed without a container": (
        (pod(0), pod(1, phase="Failed", running=False, failure="Pod was rejected")),
        "restart",
        "BackendError",
        None,
        "gpu-1",
    ),
    "one is done, one crashed": ((ended(0, 0), ended(70, 1)), "restart", "BackendError", 70, "gpu-1"),
}


@pytest.mark.parametrize(("pods", "reaction", "reason", "code", "node"), CAUSES.values(), ids=CAUSES)
def test_the_cause_is_the_pod_that_says_most(
    pods: tuple[Pod, ...], reaction: str, reason: str, code: int | None, node: str | None
) -> None:
    found = of_pods(pods)
    assert found is not None
    assert (found.reaction, found.reason, found.code, found.node) == (reaction, reason, code, node)
    assert of_pods(tuple(reversed(pods))) == found


@pytest.mark.parametrize("pods", [(), (pod(0), pod(1)), (ended(0), ended(0, 1))], ids=["none", "running", "done"])
def test_pods_that_have_not_failed_tell_no_cause(pods: tuple[Pod, ...]) -> None:
    assert of_pods(pods) is None


WORDS: dict[str, tuple[Pod, str]] = {
    "the agent's sentence": (ended(65, said="12 of 12 files are unreadable"), "node 0: 12 of 12 files are unreadable"),
    "more memory for the pod": (ended(137, exit_reason="OOMKilled"), "spec.resources.memory"),
    "a code nobody knows": (ended(139), "pod knight-1-node-0-0 on node gpu-0 exited with 139"),
    "an eviction": (
        pod(phase="Failed", disrupted=True, failure="DiskPressure"),
        "evicted from node gpu-0: DiskPressure",
    ),
    "a node that does not say": (pod(phase="Failed"), "the node does not say why"),
}


@pytest.mark.parametrize(("failed", "words"), WORDS.values(), ids=WORDS)
def test_the_cause_is_told_in_words(failed: Pod, words: str) -> None:
    found = of_pods((failed,))
    assert found is not None
    assert words in found.message


def _result(code: int, reason: str) -> AgentResult:
    return AgentResult(exit_code=ExitCode(code), reason=reason, message="said", attempt="1.0", time=1.0)


RESULTS = {
    "the agent's own reason": (75, _result(75, "DeadlineExceeded"), "DeadlineExceeded"),
    "a reason nobody knows": (75, _result(75, "x" * 4000), "Stopped"),
    "another code than the container's": (82, _result(65, "DataError"), "CollectiveTimeout"),
}


@pytest.mark.parametrize(("code", "result", "reason"), RESULTS.values(), ids=RESULTS)
def test_what_a_pod_says_is_taken_only_where_it_can_be_so(code: int, result: AgentResult, reason: str) -> None:
    found = of_pods((ended(code, result=result),))
    assert found is not None
    assert found.reason == reason


# --- by message, where the pods are gone ------------------------------------------------------------------------------

EXIT = "Container trainer for pod art/knight-1-0-x failed with exit code {} matching FailJob rule at index 1"
DISRUPTED = "Pod art/knight-1-0-x has condition DisruptionTarget matching FailJob rule at index 0"


def failed(message: str, backend: str = "job", reason: str = "PodFailurePolicy") -> Child:
    story = Story(jobset=backend == "jobset")
    story.look()
    return replace(story.child, finished="Failed", message=message, reason=reason)


MESSAGES = {
    "config": (failed(EXIT.format(64)), "fail", "InvalidConfig", 64),
    "out of memory": (failed(EXIT.format(80)), "replan", "OutOfMemory", 80),
    "stopped": (failed(EXIT.format(75)), "restart-uncounted", "Stopped", 75),
    "a crash": (failed(EXIT.format(1)), "restart", "BackendError", 1),
    "killed": (failed(EXIT.format(137)), "restart", "BackendError", 137),
    "disrupted": (failed(DISRUPTED), "restart-uncounted", "Preempted", None),
    "anything else": (failed("Job has reached the specified backoff limit"), "restart", "BackendError", None),
    "a JobSet's restarts": (failed("reached max", "jobset", "ReachedMaxRestarts"), "restart", "BackendError", None),
    "a JobSet's final rule": (
        failed("applying FailJobSet failure policy action", "jobset", "FailJobSetFailurePolicyAction"),
        "fail",
        "BackendError",
        None,
    ),
}


@pytest.mark.parametrize(("child", "reaction", "reason", "code"), MESSAGES.values(), ids=MESSAGES)
def test_without_pods_the_message_decides(child: Child, reaction: str, reason: str, code: int | None) -> None:
    found = ending(child, ())
    assert (found.reaction, found.reason, found.code) == (reaction, reason, code)


def test_a_code_that_was_noted_before_the_pods_went_decides() -> None:
    final = MESSAGES["a JobSet's final rule"][0]
    assert ending(final, (), noted=80).reaction == "replan"
    assert ending(final, (), noted=82).reaction == "fail", "82 restarts a JobSet, so it was an earlier life's"
    assert ending(final, (ended(64),), noted=80).reason == "InvalidConfig"


TAKEN: dict[str, tuple[tuple[Pod, ...], str]] = {
    "killed at the end of the grace": ((ended(137, exit_reason="Error"),), "restart-uncounted"),
    "lost its peers": ((ended(82),), "restart-uncounted"),
    "a cause of its own": ((ended(80),), "replan"),
    "a crash that says so": ((ended(70),), "restart"),
}


@pytest.mark.parametrize(("pods", "reaction"), TAKEN.values(), ids=TAKEN)
def test_what_pods_do_while_their_quota_is_taken_back_does_not_count(pods: tuple[Pod, ...], reaction: str) -> None:
    child = failed("reached max", "jobset", "ReachedMaxRestarts")
    assert ending(child, pods, workload(evicted="Preempted")).reaction == reaction


# --- what it does to the run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jobset", "job"])
@pytest.mark.parametrize("code", RULES, ids=lambda code: code.name)
def test_every_exit_code_has_its_effect(code: ExitCode, backend: str) -> None:
    story = trained(jobset=backend == "jobset", retry={"backoffSeconds": 0})
    story.fail(ended(code, 0), ended(82, 1, at=60))
    story.look(5)
    status, reaction = story.status, RULES[code].reaction
    assert status.restarts.last_exit_code == code
    assert status.attempts[0].reason == MEANINGS[code].reason
    if reaction == "fail":
        assert (status.phase, status.reason, max(story.children)) == ("Failed", MEANINGS[code].reason, 1)
        return
    assert max(story.children) == 2
    assert status.restarts.counted == (reaction == "restart")
    assert status.restarts.uncounted == (reaction != "restart")
    assert status.excluded_nodes == (["gpu-0"] if reaction == "avoid-node" else [])


def test_the_rules_name_every_code_that_is_not_done_and_split_them_for_the_jobset() -> None:
    assert set(RULES) == set(ExitCode) - {ExitCode.DONE}
    assert set(FINAL_CODES) == {64, 65, 77, 80, 81, 83}
    assert set(UNCOUNTED_CODES) == {69, 75}


def test_every_reason_of_an_exit_code_is_a_reason_of_the_api() -> None:
    assert {meaning.reason for meaning in MEANINGS.values()} <= set(Reason)


LATE = {"none has ended": (pod(0), pod(1)), "none is seen": (), "one has ended": (ended(82), pod(1))}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_a_failure_waits_for_its_pods_to_tell_why(late: tuple[Pod, ...]) -> None:
    """The watch of JobSets may be ahead of that of pods; a run that ends by mistake never comes back."""
    story = trained()
    story.fail(*late)
    decided = story.look(1)
    assert (story.status.phase, decided.create, decided.delete) == ("Recovering", (), ())
    assert decided.requeue_seconds == 9
    story.pods = (ended(64, 0), ended(82, 1))
    story.look(1)
    assert (story.status.phase, story.status.reason) == ("Failed", "InvalidConfig")


def test_a_failure_whose_pods_never_tell_is_a_crash() -> None:
    story = trained(retry={"backoffSeconds": 0})
    story.fail(message="jobset failed", reason="ReachedMaxRestarts")
    story.look(1)
    story.look(9)
    assert (story.status.attempt, story.status.restarts.last_reason) == (2, "BackendError")


def test_an_ending_of_a_jobset_that_was_attributed_wrongly_is_put_right() -> None:
    """The Job's message named a peer's 82, so the JobSet counted restarts; the cause was an eviction."""
    story = trained()
    story.fail(ended(82, 0), ended(75, 1, disrupted=True), restarts=3, restarts_counted=3, reason="ReachedMaxRestarts")
    story.look(1)
    assert (story.status.attempt, story.status.restarts.uncounted) == (2, 1)
