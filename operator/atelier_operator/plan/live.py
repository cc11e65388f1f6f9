"""What is said of a child that has not ended: quota, nodes, images, training."""

from atelier_api.progress import Progress
from atelier_api.v1alpha1.conditions import Condition, ConditionType, Reason
from atelier_operator.observed import Child, Pod
from atelier_operator.plan import reports
from atelier_operator.plan.draft import Draft
from atelier_operator.plan.ending import Ending, of_pods
from atelier_operator.plan.waiting import queue_status, say_admission, say_scheduling
from atelier_operator.times import format_time


def report(draft: Draft) -> None:
    """Progress, checkpoint, samples and data, as the runtime tells them. The checkpoint never goes back."""
    progress = draft.seen.progress
    if progress is None:
        return
    store = draft.before.store_uri or str(draft.fields.get("store_uri", ""))
    draft.fields["progress"] = reports.progress_status(progress)
    checkpoint, old = reports.checkpoint_status(progress, store), draft.before.checkpoint
    if checkpoint is not None and (old is None or checkpoint.step >= old.step):
        draft.fields["checkpoint"] = checkpoint
        draft.said.say(ConditionType.CHECKPOINTED, "True", Reason.COMMITTED)
    elif old is None:
        draft.said.say(ConditionType.CHECKPOINTED, "False", Reason.NONE)
    if progress.samples:
        draft.fields["samples"] = reports.sample_uris(progress, store)
    if progress.funnel is not None:
        draft.fields["data"] = reports.data_status(progress)


def report_artifacts(draft: Draft, pods: tuple[Pod, ...]) -> None:
    """What was published, as the first node left it, or told it last."""
    left = next((pod.result.artifacts for pod in pods if pod.index == 0 and pod.result), [])
    told = draft.seen.progress.artifacts if draft.seen.progress else []
    store = draft.before.store_uri or str(draft.fields.get("store_uri", ""))
    draft.fields["artifacts"] = reports.artifact_statuses(left or told, store)


def tell(draft: Draft, child: Child, pods: tuple[Pod, ...]) -> None:
    """Conditions and phase of a live child."""
    draft.fields["queue"] = queue_status(child, draft.seen)
    draft.said.say(ConditionType.SUCCEEDED, "False", Reason.ACTIVE)
    draft.said.say(ConditionType.FAILED, "False", Reason.ACTIVE)
    if not say_admission(child, draft.seen, draft.said):
        _without_quota(draft)
        return
    draft.said.say(ConditionType.SUSPENDED, "False", Reason.ACTIVE)
    running = say_scheduling(pods, draft.nodes, draft.said)
    if running and draft.before.start_time is None:
        draft.fields["start_time"] = format_time(draft.now)
    cause = of_pods(pods)
    draft.cause = cause or draft.cause
    progress = draft.seen.progress if running else None
    if running and cause is None and (_goes_on(draft) if progress is None else _trains(draft, progress)):
        return
    _starting(draft, child, progress, cause)


def _goes_on(draft: Draft) -> bool:
    """Whether a run that trained may be taken to train still, until its pod tells: the operator has just been started."""
    same_life = draft.records == draft.before.attempts
    return same_life and draft.before.phase in ("Running", "Publishing")


def _trains(draft: Draft, progress: Progress) -> bool:
    if progress.stage in ("Training", "Sampling"):
        draft.phase("Running", Reason.TRAINING, f"step {progress.step} of {progress.total_steps}")
    elif progress.stage in ("Publishing", "Succeeded"):
        draft.phase("Publishing", Reason.TRAINING, progress.detail)
    else:
        return False
    draft.said.say(ConditionType.RUNNING, "True", Reason.TRAINING)
    return True


def _starting(draft: Draft, child: Child, progress: Progress | None, cause: Ending | None) -> None:
    """Not training: for the first time, or again. `cause`: why present pods have ended."""
    again = cause is not None or child.restarts > 0 or child.attempt > 1
    scheduled = _said(draft, ConditionType.SCHEDULED)
    reason: str = Reason.RESTARTING if again else Reason.STARTING
    message = progress.detail if progress else ""
    if cause is not None:
        reason, message = cause.reason, cause.message
    elif scheduled.status != "True":
        reason, message = scheduled.reason, scheduled.message
    elif not message:
        message = "starting again from the newest checkpoint" if again else scheduled.message
    draft.said.say(ConditionType.RUNNING, "False", Reason.RESTARTING if again else Reason.STARTING, message)
    draft.phase("Recovering" if again else "Preparing", reason, message)


def _without_quota(draft: Draft) -> None:
    admitted = _said(draft, ConditionType.ADMITTED)
    draft.said.say(ConditionType.RUNNING, "False", admitted.reason, admitted.message)
    draft.said.say(ConditionType.SCHEDULED, "False", Reason.GANG_PENDING, "waiting for quota")
    if admitted.reason == Reason.PREEMPTED:
        draft.said.say(ConditionType.SUSPENDED, "True", Reason.PREEMPTED, admitted.message)
        draft.phase("Suspended", Reason.PREEMPTED, admitted.message)
    else:
        draft.phase("Queued", admitted.reason, admitted.message)


def _said(draft: Draft, kind: ConditionType) -> Condition:
    return next(each for each in draft.said.over(()) if each.type == kind)
