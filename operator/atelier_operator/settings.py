"""Settings of the operator: read once from the environment, which the chart sets."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """`namespaces` empty: all of them. `lease_namespace` holds the Lease of the leader; `identity` names this replica in it."""

    namespaces: tuple[str, ...] = ()
    lease_namespace: str = "default"
    lease_name: str = "atelier-operator"
    identity: str = "atelier-operator"
    metrics_port: int = 8080
    resync_seconds: float = 600.0
    progress_seconds: float = 10.0
    writes_per_second: float = 50.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Settings":
        """Raises ValueError for a number that is none."""
        names = (each.strip() for each in environment.get("ATELIER_NAMESPACES", "").split(","))
        return cls(
            namespaces=tuple(name for name in names if name),
            lease_namespace=environment.get("ATELIER_LEASE_NAMESPACE", cls.lease_namespace),
            lease_name=environment.get("ATELIER_LEASE_NAME", cls.lease_name),
            identity=environment.get("ATELIER_IDENTITY") or environment.get("HOSTNAME") or cls.identity,
            metrics_port=int(environment.get("ATELIER_METRICS_PORT", cls.metrics_port)),
            resync_seconds=float(environment.get("ATELIER_RESYNC_SECONDS", cls.resync_seconds)),
            progress_seconds=float(environment.get("ATELIER_PROGRESS_SECONDS", cls.progress_seconds)),
            writes_per_second=float(environment.get("ATELIER_WRITES_PER_SECOND", cls.writes_per_second)),
        )
