"""The JobSet's restart rules, against what the Job controller really says, and the Job's failure policy."""

import re
from typing import Any

import pytest

from atelier_api.exit_codes import ExitCode
from atelier_operator.desired import job, jobset
from atelier_operator.exit_rules import RULES
from orders import order

# Forms of Kubernetes 1.36: pkg/controller/job/pod_failure_policy.go
EXITED = (
    "Container trainer for pod art/knight-1-node-0-0-x7f2q failed with exit code {} matching FailJob rule at index 1"
)
DISRUPTED = "Pod art/knight-1-node-0-0-x7f2q has condition DisruptionTarget matching FailJob rule at index 0"


def action(reason: str, message: str) -> str:
    """What a JobSet does with a failed Job: the first rule that matches, else a counted restart."""
    policy = jobset(order())["spec"]["failurePolicy"]
    for rule in policy["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


BY_REACTION = {
    "fail": "FailJobSet",
    "replan": "FailJobSet",
    "avoid-node": "FailJobSet",
    "restart": "RestartJobSet",
    "restart-uncounted": "RestartJobSetAndIgnoreMaxRestarts",
}


@pytest.mark.parametrize("code", RULES, ids=lambda code: code.name)
def test_every_code_of_the_agent_has_its_rule(code: ExitCode) -> None:
    assert action("PodFailurePolicy", EXITED.format(int(code))) == BY_REACTION[RULES[code].reaction]


@pytest.mark.parametrize("code", [1, 2, 5, 6, 7, 8, 9, 137, 139, 143, 164, 175, 180, 181, 255, 640, 777])
def test_other_codes_are_counted_restarts(code: int) -> None:
    assert action("PodFailurePolicy", EXITED.format(code)) == "RestartJobSet"


OTHERS = {
    "a disruption": ("PodFailurePolicy", DISRUPTED, "RestartJobSetAndIgnoreMaxRestarts"),
    "another condition": ("PodFailurePolicy", DISRUPTED.replace("DisruptionTarget", "Ready"), "RestartJobSet"),
    "the backoff limit": ("BackoffLimitExceeded", EXITED.format(64), "RestartJobSet"),
    "a pod whose name looks like a code": (
        "PodFailurePolicy",
        EXITED.format(1).replace("knight", "64"),
        "RestartJobSet",
    ),
}


@pytest.mark.parametrize(("reason", "message", "expected"), OTHERS.values(), ids=OTHERS)
def test_what_has_no_code(reason: str, message: str, expected: str) -> None:
    assert action(reason, message) == expected


@pytest.mark.parametrize("name", ["final", "uncounted"])
def test_patterns_are_plain_enough_for_re2(name: str) -> None:
    (rule,) = (each for each in jobset(order())["spec"]["failurePolicy"]["rules"] if each["name"] == name)
    for pattern in rule["onJobFailureMessagePatterns"]:
        assert re.fullmatch(r"[a-zA-Z0-9 ()|]+", pattern)


def _spec(of: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = of["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"] if of["kind"] == "JobSet" else spec


@pytest.mark.parametrize("manifest", [jobset(order()), job(order(backend="job"))], ids=["JobSet", "Job"])
def test_one_lost_pod_fails_the_gang_and_evictions_are_told_first(manifest: dict[str, Any]) -> None:
    spec = _spec(manifest)
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        2,
        2,
        0,
    )
    assert spec["podReplacementPolicy"] == "Failed", "the only value that podFailurePolicy allows"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    first, second = spec["podFailurePolicy"]["rules"]
    assert first["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert second["onExitCodes"] == {"operator": "NotIn", "values": [0]}, (
        "of the container that fetches the model as well"
    )
    assert {first["action"], second["action"]} == {"FailJob"}
    assert spec["template"]["spec"]["containers"][0]["name"] == "trainer"


def test_the_child_carries_what_an_operator_that_comes_back_must_know() -> None:
    of = order(attempt=2, restarts_left=1)
    for manifest in (jobset(of), job(of)):
        annotations = manifest["metadata"]["annotations"]
        assert annotations["atelier.dev/steps"] == "100"
        assert of.run_file.plan.model_validate_json(annotations["atelier.dev/plan"]) == of.run_file.plan
        assert manifest["metadata"]["labels"]["atelier.dev/attempt"] == "2"
        (owner,) = manifest["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["controller"], owner["blockOwnerDeletion"]) == ("TrainingRun", True, True)
    assert jobset(of)["spec"]["failurePolicy"]["maxRestarts"] == 1
