"""The operator's own metrics, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

PREFIX = "atelier"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """What the operator counts of itself."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_operator_api_requests_total",
            "Requests to the API server.",
            ("verb", "kind", "code"),
            registry=self.registry,
        )
        self._reconciles = Counter(
            f"{PREFIX}_operator_reconciles_total", "Passes over a run.", ("result",), registry=self.registry
        )
        self._seconds = Histogram(
            f"{PREFIX}_operator_reconcile_duration_seconds",
            "Duration of a pass over a run.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._leader = Gauge(f"{PREFIX}_operator_leader", "1 on the replica that writes.", registry=self.registry)
        self._last_event = Gauge(
            f"{PREFIX}_operator_watch_last_event_timestamp_seconds",
            "When a watch last brought something.",
            ("kind",),
            registry=self.registry,
        )
        self._runs = Gauge(f"{PREFIX}_runs", "Runs by phase.", ("phase",), registry=self.registry)
        self._queue = Gauge(
            f"{PREFIX}_operator_queue_length", "Runs that wait to be looked at.", registry=self.registry
        )

    def request(self, verb: str, kind: str, code: int) -> None:
        """A request was answered; 0: it was not."""
        self._requests.labels(verb, kind, str(code)).inc()

    def reconciled(self, result: str, seconds: float) -> None:
        """A pass has ended: ok or error."""
        self._reconciles.labels(result).inc()
        self._seconds.observe(seconds)

    def leader(self, leads: bool) -> None:
        self._leader.set(leads)

    def event(self, kind: str, time: float) -> None:
        """A watch has brought something."""
        self._last_event.labels(kind).set(time)

    def runs(self, phases: dict[str, int]) -> None:
        """How many runs are in each phase."""
        for phase, count in phases.items():
            self._runs.labels(phase).set(count)

    def queue(self, length: int) -> None:
        self._queue.set(length)
