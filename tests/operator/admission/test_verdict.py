"""What the webhook says of a run: what the operator's pass says of it, but for changes that make nothing worse."""

import copy
from typing import Any

import pytest

from atelier_operator.admission.review import Verdict
from atelier_operator.admission.verdict import judge
from atelier_operator.observed import Apis, Observed, Run
from atelier_operator.plan import plan
from atelier_operator.profiles import profile_of, profile_reference
from reviews import Profiles, profiles, read, review
from run_stories import START, raw_run

LARGE: dict[str, Any] = {
    "model": {"family": "flux"},
    "adapter": {"type": "full"},
    "parallelism": {"gpuClass": "l4-24g"},
}

Object = dict[str, Any]

CREATED: dict[str, tuple[Object, Object, int, str]] = {
    "a sound one": ({}, {}, 0, ""),
    "a field out of bounds": ({"hyperparameters": {"steps": 0}}, {}, 422, "spec.hyperparameters.steps is 0"),
    "a word that no field is called": ({"adapter": {"rnak": 4}}, {}, 422, "did you mean rank?"),
    "too large for the GPU": (LARGE, {}, 422, "would fit: "),
    "more nodes than allowed": ({}, {"limits": {"nodes": 1}}, 403, "the profile allows at most 1"),
    "a kind of GPU that the profile lacks": (
        {"parallelism": {"gpuClass": "h10-80g"}},
        {},
        422,
        "did you mean h100-80g?",
    ),
}


@pytest.mark.parametrize(("spec", "profile", "code", "said"), CREATED.values(), ids=CREATED)
def test_a_new_run_is_let_in_or_refused_with_the_words_of_the_status(
    spec: Object, profile: Object, code: int, said: str
) -> None:
    run, find = raw_run(**spec), profiles(**profile)
    verdict = judge(read(review(run)), find)
    assert verdict.code == code
    assert said in verdict.message
    of_the_pass = status_of(run, find)
    assert (of_the_pass.reason in ("InvalidSpec", "DoesNotFit", "NotPermitted")) == bool(code)
    assert verdict.message == (of_the_pass.message if code else "")


def status_of(run: Object, find: Profiles) -> Any:
    """What the operator's first pass writes of it."""
    found, problem = profile_of(Run.of(run), find)
    return plan(Run.of(run), Observed(Apis(), found, problem), START).status


MISSING: dict[str, tuple[Profiles, Object]] = {
    "none of that name": (Profiles(), {}),
    "one that cannot be read": (Profiles({("ClusterTrainingProfile", "default"): {"spec": {"image": 7}}}), {}),
    "one of the namespace": (profiles(), {"profileRef": {"kind": "TrainingProfile", "name": "default"}}),
}


@pytest.mark.parametrize(("find", "spec"), MISSING.values(), ids=MISSING)
def test_a_profile_that_is_missing_may_still_come(find: Profiles, spec: Object) -> None:
    verdict = judge(read(review(raw_run(**spec))), find)
    assert (verdict.result, verdict.code) == ("warned", 0)
    assert "Profile default" in verdict.message


def test_a_broken_spec_is_refused_whatever_the_profile_is() -> None:
    assert judge(read(review(raw_run(hyperparameters={"steps": 0}))), Profiles()).code == 422


def test_a_name_that_the_api_server_makes_later_stands_for_itself() -> None:
    run = raw_run()
    run["metadata"] = {"generateName": "knight-"}
    assert judge(read(review(run, name="")), profiles()) == Verdict("allowed")


# --- changes ------------------------------------------------------------------------------------------------------------


def edited(run: Object, **spec: Any) -> Object:
    changed = copy.deepcopy(run)
    for block, fields in spec.items():
        changed["spec"][block] = changed["spec"].get(block, {}) | fields
    return changed


def labelled(run: Object, **metadata: Any) -> Object:
    changed = copy.deepcopy(run)
    changed["metadata"] |= metadata
    return changed


def test_a_change_that_breaks_a_sound_run_is_refused() -> None:
    run = raw_run()
    verdict = judge(read(review(edited(run, hyperparameters={"steps": 0}), run)), profiles())
    assert (verdict.result, verdict.code) == ("refused", 422)


TOO_LARGE = raw_run(**LARGE)
LET_IN: dict[str, tuple[Object, Object]] = {
    "labels": (TOO_LARGE, labelled(TOO_LARGE, labels={"a": "b"})),
    "the removal of a finalizer": (
        labelled(TOO_LARGE, finalizers=["a/b"], deletionTimestamp="2026-11-01T12:00:00Z"),
        labelled(TOO_LARGE, finalizers=[], deletionTimestamp="2026-11-01T12:00:00Z"),
    ),
    "a spec on its way out": (
        raw_run(),
        labelled(edited(raw_run(), hyperparameters={"steps": 0}), deletionTimestamp="2026-11-01T12:00:00Z"),
    ),
    "a run that has failed": (
        raw_run(status={"phase": "Failed"}),
        edited(raw_run(status={"phase": "Failed"}), hyperparameters={"steps": 0}),
    ),
    "a run that has succeeded": (
        raw_run(status={"phase": "Succeeded"}),
        edited(raw_run(status={"phase": "Succeeded"}), hyperparameters={"steps": 0}),
    ),
}


@pytest.mark.parametrize(("before", "after"), LET_IN.values(), ids=LET_IN)
def test_never_refused(before: Object, after: Object) -> None:
    assert judge(read(review(after, before)), profiles()) == Verdict("allowed")


def test_a_run_that_could_not_start_before_can_still_be_stopped() -> None:
    verdict = judge(read(review(edited(TOO_LARGE, schedule={"suspend": True}), TOO_LARGE)), profiles())
    assert (verdict.result, verdict.code) == ("warned", 0)
    assert "does not fit" in verdict.message


def test_a_run_that_is_refused_for_another_reason_than_before_is_refused() -> None:
    verdict = judge(read(review(edited(TOO_LARGE, hyperparameters={"steps": 0}), TOO_LARGE)), profiles())
    assert verdict.code == 422


OTHERS: dict[str, Object] = {
    "the status": {"subResource": "status"},
    "a deletion": {"operation": "DELETE", "object": None},
    "another kind": {"resource": {"group": "atelier.dev", "version": "v1alpha1", "resource": "trainingprofiles"}},
}


@pytest.mark.parametrize("request_fields", OTHERS.values(), ids=OTHERS)
def test_what_is_none_of_its_business_is_let_in(request_fields: Object) -> None:
    broken = raw_run(hyperparameters={"steps": 0})
    assert judge(read(review(broken, **request_fields)), profiles()) == Verdict("allowed")


REFERENCES: dict[str, tuple[Any, tuple[str, str]]] = {
    "none": ({}, ("ClusterTrainingProfile", "default")),
    "a name": ({"profileRef": {"name": "a"}}, ("ClusterTrainingProfile", "a")),
    "both": ({"profileRef": {"kind": "TrainingProfile", "name": "a"}}, ("TrainingProfile", "a")),
    "another kind": ({"profileRef": {"kind": "Secret", "name": "a"}}, ("ClusterTrainingProfile", "")),
    "a list": ({"profileRef": {"name": ["a"]}}, ("ClusterTrainingProfile", "")),
    "no spec": ("spec", ("ClusterTrainingProfile", "default")),
    "nothing": ({"profileRef": None}, ("ClusterTrainingProfile", "default")),
}


@pytest.mark.parametrize(("spec", "found"), REFERENCES.values(), ids=REFERENCES)
def test_a_profile_is_named_by_any_spec(spec: Any, found: tuple[str, str]) -> None:
    assert profile_reference(spec) == found
