"""What is said of a change to a run: what `accept` says, which the operator asks in each pass as well. Pure."""

from atelier_api.v1alpha1.conditions import Reason
from atelier_operator.admission.review import ALLOWED, CHANGES, Raw, Review, Verdict
from atelier_operator.observed import Apis, Observed, Run
from atelier_operator.plan.acceptance import Refused, accept
from atelier_operator.plan.conditions import LONGEST_MESSAGE
from atelier_operator.profiles import Find, profile_of

UNNAMED = "run"
"""Stands for a name that the API server makes after the webhook."""


def judge(review: Review, find: Find) -> Verdict:
    """Refuses a run that the operator would not execute. Two kinds of those it only warns of: one whose profile is missing, since
    the same `kubectl apply` may bring it a moment later; and a change to one that could not be executed before either, for the
    same reason: it makes nothing worse, and may be the wish to stop it."""
    if not review.ours or review.subresource or review.operation not in CHANGES:
        return ALLOWED
    run = _run(review, review.run)
    before = _run(review, review.before) if review.before else None
    if before is not None and (run.deleting or before.terminal or _spec(run) == _spec(before)):
        return ALLOWED
    refused = _refused(run, find)
    if refused is None:
        return ALLOWED
    message = refused.message[:LONGEST_MESSAGE]
    if refused.reason is Reason.PROFILE_NOT_FOUND:
        return Verdict("warned", f"stored, but it cannot start: {message}")
    earlier = None if before is None else _refused(before, find)
    if earlier is not None and earlier.reason is refused.reason:
        return Verdict("warned", f"stored, but as before it cannot start: {message}")
    return Verdict("refused", message, 403 if refused.reason is Reason.NOT_PERMITTED else 422)


def _refused(run: Run, find: Find) -> Refused | None:
    profile, problem = profile_of(run, find)
    found = accept(run, Observed(apis=Apis(), profile=profile, profile_problem=problem))
    return found if isinstance(found, Refused) else None


def _run(review: Review, raw: Raw) -> Run:
    """The run, with what the API server has not filled in yet."""
    metadata = raw["metadata"]
    identity = {
        "name": metadata.get("name") or review.name or UNNAMED,
        "namespace": metadata.get("namespace") or review.namespace,
        "uid": metadata.get("uid") or "",
    }
    return Run.of({**raw, "metadata": {**metadata, **identity}})


def _spec(run: Run) -> object:
    return run.document.get("spec")
