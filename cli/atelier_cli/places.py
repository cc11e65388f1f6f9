"""Where a local run's things lie, told without planning it. The planner's `resolve_local` puts them there."""

from pathlib import Path

from atelier_api.run_file import RunIdentity
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner.local import Surroundings


def store_uri(run: TrainingRun, around: Surroundings) -> str:
    """Root of everything that the run writes, as `RunFile.store_uri`."""
    uri = run.spec.storage.uri
    base = uri.rstrip("/") if uri.startswith("s3://") else str(around.absolute(uri))
    identity = RunIdentity(namespace=run.metadata.namespace, name=run.metadata.name, uid="local")
    return f"{base}/{identity.prefix}"


def scratch_folder(run: TrainingRun, around: Surroundings) -> Path:
    """The run's scratch folder, as `RunFile.scratch`."""
    uri = run.spec.storage.uri
    base = around.cache if uri.startswith("s3://") else around.absolute(uri)
    return base / ".scratch" / f"{run.metadata.namespace}-{run.metadata.name}"
