"""A child that the status does not know: the operator was stopped after it had made the child, before it wrote the status."""

from atelier_api.v1alpha1.conditions import Reason
from atelier_operator.observed import Child
from atelier_operator.plan import attempts
from atelier_operator.plan.acceptance import Accepted, Refused
from atelier_operator.plan.draft import Draft
from atelier_operator.plan.ending import ending, of_loss, of_pods
from atelier_operator.plan.starting import plan_status


def adopt(draft: Draft, child: Child, accepted: Accepted | Refused) -> None:
    """Take the child for the present attempt, with the plan that it carries, and close the one before it."""
    draft.fields["attempt"] = child.attempt
    if child.plan is not None:
        draft.fields["plan"] = plan_status(child.plan, child.backend, child.queue)
    if draft.before.store_uri is None and isinstance(accepted, Accepted):
        draft.fields["store_uri"] = accepted.run_file.store_uri
    if attempts.is_open(draft.records):
        _close(draft)


def _close(draft: Draft) -> None:
    """Close the attempt before, as the lost status did."""
    newest = draft.records[-1]
    older = draft.seen.child(newest.number)
    if newest.reason == attempts.SUSPENDED:
        draft.close_attempt(attempts.SUSPENDED, attempts.STOPPED_ON_REQUEST)
        return
    if older is not None and older.finished == "Completed":
        draft.close_attempt(Reason.COMPLETED, f"{older.steps} steps done")
        return
    if older is None:
        cause = of_loss(newest)
    else:
        pods = draft.seen.pods_of(newest.number)
        cause = ending(older, pods, noted=newest.last_exit_code)
        draft.records = attempts.recorded(draft.records, older, None, of_pods(pods))
    draft.cause = cause
    draft.close_attempt(cause.reason, cause.message)
    draft.records = attempts.charged(draft.records, counted=cause.reaction == "restart")
