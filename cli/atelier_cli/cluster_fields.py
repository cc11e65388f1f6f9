"""Fields of a run that only a cluster reads. A run on this machine says so, rather than leave the user to wait for them."""

from pydantic import BaseModel

from atelier_api.v1alpha1 import TrainingRun

SUSPEND = "spec.schedule.suspend"
FIELDS = (
    "spec.profileRef",
    "spec.model.credentialsRef",
    "spec.parallelism.gpuClass",
    "spec.parallelism.network",
    "spec.storage.credentialsRef",
    "spec.schedule.queue",
    "spec.schedule.priority",
    "spec.schedule.startTimeoutSeconds",
    "spec.schedule.ttlSecondsAfterFinished",
)


def ignored_here(run: TrainingRun) -> list[str]:
    """A line for a suspension, and one that names the other fields that were given."""
    lines = []
    if run.spec.schedule.suspend:
        lines.append(f"{SUSPEND} is true; it is ignored on this machine, where Ctrl-C stops a run")
    given = [path for path in FIELDS if _given(run, path)]
    if given:
        are = "is" if len(given) == 1 else "are"
        lines.append(f"{', '.join(given)} {are} for clusters and {'has' if len(given) == 1 else 'have'} no effect here")
    return lines


def _given(run: TrainingRun, path: str) -> bool:
    """Whether the field differs from its default."""
    block: BaseModel = run
    *above, last = path.split(".")
    for name in above:
        block = getattr(block, name)
    field = next(key for key, info in type(block).model_fields.items() if info.alias == last or key == last)
    info = type(block).model_fields[field]
    return bool(getattr(block, field) != info.get_default(call_default_factory=True))
