"""Settings of the operator: read once from the environment, which the chart sets."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """`namespaces` empty: all of them. `lease_namespace` holds the Lease of the leader; `identity` names this replica in it.
    `metrics_port` 0: any that is free. `webhook_port` 0: no webhook; `webhook_certificates` is the folder with its tls.crt and
    tls.key. A leader that is gone is followed by another one after `lease_seconds`; a watch that brings nothing for
    `silence_seconds` is opened again."""

    namespaces: tuple[str, ...] = ()
    lease_namespace: str = "default"
    lease_name: str = "atelier-operator"
    identity: str = "atelier-operator"
    metrics_port: int = 8080
    webhook_port: int = 0
    webhook_certificates: str = "/etc/atelier/webhook"
    resync_seconds: float = 600.0
    progress_seconds: float = 10.0
    lease_seconds: float = 15.0
    silence_seconds: float = 70.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Settings":
        """Raises ValueError for a number that is none."""
        names = (each.strip() for each in environment.get("ATELIER_NAMESPACES", "").split(","))
        return cls(
            namespaces=tuple(name for name in names if name),
            lease_namespace=environment.get("ATELIER_LEASE_NAMESPACE", cls.lease_namespace),
            lease_name=environment.get("ATELIER_LEASE_NAME", cls.lease_name),
            identity=environment.get("ATELIER_IDENTITY") or environment.get("HOSTNAME") or cls.identity,
            metrics_port=_port(environment, "ATELIER_METRICS_PORT", cls.metrics_port),
            webhook_port=_port(environment, "ATELIER_WEBHOOK_PORT", cls.webhook_port),
            webhook_certificates=environment.get("ATELIER_WEBHOOK_CERTIFICATES") or cls.webhook_certificates,
            resync_seconds=_number(environment, "ATELIER_RESYNC_SECONDS", cls.resync_seconds),
            progress_seconds=_number(environment, "ATELIER_PROGRESS_SECONDS", cls.progress_seconds),
            lease_seconds=_number(environment, "ATELIER_LEASE_SECONDS", cls.lease_seconds),
            silence_seconds=_number(environment, "ATELIER_SILENCE_SECONDS", cls.silence_seconds),
        )


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise ValueError(f"{name} is {text!r}; must be a number above 0 and below 1000000")
    return number


def _port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"{name} is {text!r}; must be a whole number from 0 to 65535")
    return int(text)
