"""What the commands for clusters tell of a run, by its object."""

from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from atelier_api.errors import ConfigError
from atelier_api.exit_codes import ExitCode
from atelier_api.v1alpha1 import TrainingRun
from atelier_cli.cluster_api import KindMissing, NotAllowed, NotThere, ServerError, problem
from atelier_cli.cluster_commands import NOT_SEEN, facts_of, namespace_of, row
from atelier_cli.cluster_fields import ignored_here
from atelier_cli.cluster_follow import decided, exit_code, headline, progress_of

Object = dict[str, Any]

SPEC: Object = {
    "model": {"family": "sdxl", "source": "/models/base"},
    "data": {"sources": [{"uri": "s3://bucket/pictures"}], "resolution": 512},
    "hyperparameters": {"steps": 100},
}
PROGRESS: Object = {"stage": "Training", "step": 40, "totalSteps": 100, "loss": "0.25", "etaSeconds": 90}


def training_run(namespace: str | None = None, **spec: Any) -> TrainingRun:
    metadata = {"name": "knight"} | ({"namespace": namespace} if namespace else {})
    document = {"apiVersion": "atelier.dev/v1alpha1", "kind": "TrainingRun", "metadata": metadata, "spec": SPEC | spec}
    return TrainingRun.model_validate(document)


def run(spec: Object | None = None, generation: int = 1, **status: Any) -> Object:
    """A run as the API server has it."""
    metadata = {"name": "knight", "namespace": "art", "generation": generation}
    return {"metadata": metadata, "spec": spec or {}, "status": {"observedGeneration": 1, **status}}


def refusal(code: int, **status: Any) -> ApiException:
    import json

    error = ApiException(status=code, reason="Reason")
    error.body = json.dumps(status)
    return error


# --- submit -----------------------------------------------------------------------------------------------------------


def test_the_namespace_is_that_of_the_option_or_of_the_file() -> None:
    assert namespace_of(training_run(), None) is None
    assert namespace_of(training_run("art"), None) == "art"
    assert namespace_of(training_run(), "film") == "film"
    assert namespace_of(training_run("art"), "art") == "art"
    with pytest.raises(ConfigError, match=r"--namespace is film, metadata\.namespace of the file is art"):
        namespace_of(training_run("art"), "film")


def test_fields_for_clusters_are_named_where_they_have_no_effect() -> None:
    assert ignored_here(training_run()) == []
    schedule = {"queue": "gpu", "priority": "low", "suspend": True}
    assert ignored_here(training_run(schedule=schedule)) == [
        "spec.schedule.suspend is true; it is ignored on this machine, where Ctrl-C stops a run",
        "spec.schedule.queue, spec.schedule.priority are for clusters and have no effect here",
    ]
    one = training_run(profileRef={"name": "large"})
    assert ignored_here(one) == ["spec.profileRef is for clusters and has no effect here"]


# --- status -----------------------------------------------------------------------------------------------------------


def test_a_run_that_nobody_has_looked_at_says_so() -> None:
    new = {"metadata": {"name": "knight", "namespace": "art"}, "spec": {}}
    assert facts_of(new) == [("phase", f"Pending: {NOT_SEEN}")]
    assert row(new)[:2] == ["knight", "Pending"]


def test_a_run_tells_what_is_known_of_it() -> None:
    facts = dict(
        facts_of(
            run(
                phase="Running",
                message="step 40 of 100",
                progress=PROGRESS,
                restarts={"counted": 1, "uncounted": 2},
                excludedNodes=["gpu-7"],
                checkpoint={"step": 20, "sizeBytes": 3 * 2**20},
                queue={"name": "gpu"},
                artifacts=[
                    {"format": "diffusers", "uri": "s3://runs/x.safetensors", "sizeBytes": 2 << 20, "sha256": "ab"}
                ],
                cost={"gpuSeconds": 5400, "spent": "4.2", "expected": "8.4", "currency": "USD"},
            )
        )
    )
    assert facts["diffusers"] == "s3://runs/x.safetensors, 2 MiB"
    assert facts["cost"] == "1.50 GPU hours, 4.20 USD of about 8.40"
    assert facts["progress"] == "Training, step 40 of 100, loss 0.25"
    assert facts["restarts"] == "1 counted, 2 that do not count"
    assert (facts["avoids"], facts["queue"]) == ("gpu-7", "gpu")
    assert facts["checkpoint"].startswith("step 20, ")


# --- follow -----------------------------------------------------------------------------------------------------------


def test_while_it_trains_the_message_makes_no_new_line() -> None:
    one = headline({"phase": "Running", "reason": "Training", "message": "step 1 of 9"})
    other = headline({"phase": "Running", "reason": "Training", "message": "step 2 of 9"})
    assert one == other
    waiting = headline({"phase": "Queued", "reason": "WaitingForQuota", "message": "place 2"})
    assert waiting[1] == "Queued (WaitingForQuota): place 2"
    assert waiting != headline({"phase": "Queued", "reason": "WaitingForQuota", "message": "place 1"})


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (run(phase="Succeeded"), True),
        (run(phase="Failed"), True),
        (run(phase="Running"), False),
        (run(phase="Pending", conditions=[{"type": "Accepted", "status": "False"}]), True),
        (run(phase="Pending", conditions=[{"type": "Fits", "status": "False"}]), True),
        (run(phase="Pending", conditions=[{"type": "Fits", "status": "Unknown"}]), False),
        (run(generation=2, phase="Pending", conditions=[{"type": "Fits", "status": "False"}]), False),
        (run({"schedule": {"suspend": True}}, phase="Suspended", reason="Requested"), True),
        (run({"schedule": {"suspend": True}}, phase="Suspended", reason="Stopping"), False),
        (run({"schedule": {"suspend": False}}, phase="Suspended", reason="Preempted"), False),
    ],
)
def test_it_is_followed_until_there_is_nothing_to_wait_for(seen: Object, expected: bool) -> None:
    assert decided(seen) is expected


@pytest.mark.parametrize(
    ("reason", "last", "code"),
    [
        ("Diverged", None, ExitCode.DIVERGED),
        ("MaxRestarts", 82, ExitCode.COLLECTIVE_TIMEOUT),
        ("MaxRestarts", 64, ExitCode.INTERNAL),
        ("MaxRestarts", None, ExitCode.INTERNAL),
        ("DeadlineExceeded", None, ExitCode.STOPPED),
        ("SomethingNew", None, ExitCode.INTERNAL),
    ],
)
def test_a_failure_has_the_code_that_it_would_have_had_here(reason: str, last: int | None, code: ExitCode) -> None:
    assert exit_code({"reason": reason, "restarts": {"lastExitCode": last}}) is code


def test_progress_names_what_lies_in_the_store_by_its_place_in_it() -> None:
    store = "s3://bucket/runs/art/knight"
    checkpoint = {"step": 20, "uri": f"{store}/checkpoints/20.json", "sizeBytes": 5, "time": "t"}
    told = progress_of(
        {
            "storeUri": store,
            "progress": PROGRESS,
            "samples": [f"{store}/samples/1.png"],
            "checkpoint": checkpoint | {"manifestSha256": "0" * 64},
        }
    )
    assert told is not None
    assert told.checkpoint is not None
    assert (told.step, told.checkpoint.manifest, told.samples) == (40, "checkpoints/20.json", ["samples/1.png"])
    assert progress_of({}) is None


# --- refusals ---------------------------------------------------------------------------------------------------------


def cause(field: str, message: str) -> Object:
    return {"details": {"name": "knight", "causes": [{"field": field, "message": message}]}}


@pytest.mark.parametrize(
    "message",
    ['Invalid value: "object": cannot change', "Invalid value: cannot change", "cannot change"],
)
def test_a_rule_speaks_for_itself(message: str) -> None:
    assert str(problem(refusal(422, **cause("spec.model", message)))) == "spec.model: cannot change"


@pytest.mark.parametrize(
    "message", ['Invalid value: "x": is none', "Invalid value: 0: too small", "Invalid value: true: no"]
)
def test_a_value_stays_part_of_the_message(message: str) -> None:
    assert str(problem(refusal(422, **cause("spec.x", message)))) == f"spec.x: {message}"


@pytest.mark.parametrize("code", [403, 422])
def test_what_our_webhook_refuses_is_a_mistake_in_the_file(code: int) -> None:
    said = "spec.parallelism.nodes is 2; the profile allows at most 1"
    found = problem(refusal(code, message=f'admission webhook "trainingruns.atelier.dev" denied the request: {said}'))
    assert isinstance(found, ConfigError)
    assert str(found) == said
    other = problem(refusal(403, message=f'admission webhook "policy.example.org" denied the request: {said}'))
    assert isinstance(other, NotAllowed)


def test_refusals_are_told_apart() -> None:
    assert isinstance(problem(refusal(404, message="m", details={"name": "knight"})), NotThere)
    assert isinstance(problem(refusal(404)), KindMissing)
    for code in (401, 403):
        assert isinstance(problem(refusal(code, message="m")), NotAllowed)
    assert isinstance(problem(refusal(409, message="m")), ConfigError)
    error = problem(refusal(503, message="etcd is away"))
    assert isinstance(error, ServerError)
    assert error.exit_code == ExitCode.STORE_UNREACHABLE
