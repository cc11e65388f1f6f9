"""Attempts to be made, for tests of manifests."""

from typing import Any

from atelier_api.read import problems
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.desired import Order
from atelier_operator.names import SCRATCH
from atelier_operator.observed import Backend
from atelier_operator.planner.cluster import cluster_run_file
from atelier_operator.snapshot import Snapshot
from run_stories import UID, raw_run
from run_stories import profile as profile_of


def order(
    *,
    backend: Backend = "jobset",
    queue: str | None = None,
    attempt: int = 1,
    restarts_left: int = 3,
    excluded_nodes: tuple[str, ...] = (),
    profile: dict[str, Any] | None = None,
    **spec: Any,
) -> Order:
    """An attempt of the run of `run_stories`, with blocks of its spec and fields of the profile changed."""
    raw = raw_run(**spec)
    raw["metadata"] = {"name": raw["metadata"]["name"], "namespace": raw["metadata"]["namespace"]}
    assert problems(raw) == []
    run, found = TrainingRun.model_validate(raw), profile_of(**(profile or {}))
    return Order(
        run_file=cluster_run_file(run, found, uid=UID, attempt=attempt, scratch=SCRATCH),
        snapshot=Snapshot(profile=found, spec=run.spec),
        attempt=attempt,
        backend=backend,
        queue=queue,
        restarts_left=restarts_left,
        excluded_nodes=excluded_nodes,
    )
