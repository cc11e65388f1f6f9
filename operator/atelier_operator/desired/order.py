"""What the builders of manifests are given: one attempt of a run, decided in every point."""

from dataclasses import dataclass

from atelier_api.run_file import RunFile
from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_operator.names import (
    API_VERSION,
    ATTEMPT_LABEL,
    MANAGED_BY,
    MANAGER,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    RUN_LABEL,
    UID_LABEL,
    child_name,
)
from atelier_operator.observed import Backend
from atelier_operator.snapshot import Snapshot


@dataclass(frozen=True)
class Order:
    """An attempt to be made. `queue` is the Kueue LocalQueue, if any; `restarts_left` those that still count."""

    run_file: RunFile
    snapshot: Snapshot
    attempt: int
    backend: Backend
    queue: str | None
    restarts_left: int
    excluded_nodes: tuple[str, ...] = ()

    @property
    def profile(self) -> TrainingProfileSpec:
        return self.snapshot.profile

    @property
    def name(self) -> str:
        return child_name(self.run_file.identity.name, self.attempt)

    @property
    def labels(self) -> dict[str, str]:
        """Labels of everything that belongs to the attempt."""
        identity = self.run_file.identity
        return {
            MANAGED_BY: MANAGER,
            RUN_LABEL: identity.name,
            UID_LABEL: identity.uid,
            ATTEMPT_LABEL: str(self.attempt),
        }

    @property
    def queue_labels(self) -> dict[str, str]:
        """Labels by which Kueue takes the child in charge; on the child alone, never on what lies below it."""
        if self.queue is None:
            return {}
        priority = self.run_file.spec.schedule.priority
        return {QUEUE_LABEL: self.queue} | ({PRIORITY_LABEL: priority} if priority else {})

    def metadata(self, name: str | None = None) -> dict[str, object]:
        """Metadata of an object of the attempt, owned by the run: it goes when the run goes."""
        identity = self.run_file.identity
        owner = {
            "apiVersion": API_VERSION,
            "kind": "TrainingRun",
            "name": identity.name,
            "uid": identity.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
        return {
            "name": name or self.name,
            "namespace": identity.namespace,
            "labels": self.labels,
            "ownerReferences": [owner],
        }
