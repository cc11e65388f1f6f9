"""Whether a run can be executed at all: its spec, its profile, the fit. Said before anything is created."""

from dataclasses import dataclass

from atelier_api.errors import ConfigError
from atelier_api.read import problems, validated
from atelier_api.run_file import RunFile
from atelier_api.v1alpha1 import TrainingRun
from atelier_api.v1alpha1.conditions import ConditionType, Reason
from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_operator.names import SCRATCH
from atelier_operator.observed import Observed, Run
from atelier_operator.plan.attempts import SUSPENDED
from atelier_operator.planner.cluster import DoesNotFit, cluster_run_file, not_permitted
from atelier_operator.snapshot import Snapshot, kept


@dataclass(frozen=True)
class Accepted:
    """A run that can be executed: `run_file` is that of a first attempt. `drift` are fields that were changed although the run had
    been started: it goes on with what they were."""

    run: TrainingRun
    profile: TrainingProfileSpec
    run_file: RunFile
    drift: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Why not. `kind` is the condition that is False."""

    kind: ConditionType
    reason: Reason
    message: str


def accept(run: Run, seen: Observed) -> Accepted | Refused:
    """The run, checked as `atelier validate` and `atelier plan` check it, and against its profile."""
    found = problems(run.document)
    if found:
        return Refused(ConditionType.ACCEPTED, Reason.INVALID_SPEC, "; ".join(map(str, found[:5])))
    parsed, drift = _kept(validated(run.document), seen.snapshot)
    profile = _profile(run, seen)
    if profile is None:
        reference = parsed.spec.profile_ref
        name = f"{reference.kind} {reference.name}"
        message = f"spec.profileRef names {name}, which does not exist; the administrator of the cluster makes profiles"
        if seen.profile_problem:
            message = f"{name} cannot be used: {seen.profile_problem}"
        return Refused(ConditionType.ACCEPTED, Reason.PROFILE_NOT_FOUND, message)
    forbidden = not_permitted(parsed.spec, profile)
    if forbidden:
        return Refused(ConditionType.ACCEPTED, Reason.NOT_PERMITTED, "; ".join(forbidden))
    try:
        run_file = cluster_run_file(parsed, profile, uid=run.uid, attempt=1, scratch=SCRATCH)
    except DoesNotFit as error:
        return Refused(ConditionType.FITS, Reason.DOES_NOT_FIT, str(error))
    except ConfigError as error:
        return Refused(ConditionType.ACCEPTED, Reason.INVALID_SPEC, str(error))
    return Accepted(parsed, profile, run_file, drift)


def _kept(parsed: TrainingRun, snapshot: Snapshot | None) -> tuple[TrainingRun, tuple[str, ...]]:
    """The run as it goes on, and which of its changes are ignored."""
    if snapshot is None:
        return parsed, ()
    spec, drift = kept(parsed.spec, snapshot.spec)
    return parsed.model_copy(update={"spec": spec}), drift


def _profile(run: Run, seen: Observed) -> TrainingProfileSpec | None:
    """The profile as it was when the run was started; one that the user has stopped meanwhile takes it as it is now."""
    records = run.status.attempts
    stopped = bool(records) and records[-1].end is not None and records[-1].reason == SUSPENDED
    return seen.profile if seen.snapshot is None or stopped else seen.snapshot.profile
