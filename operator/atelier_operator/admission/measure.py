"""The webhook's metrics, in the operator's registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from atelier_operator.admission.review import CHANGES
from atelier_operator.metrics import PREFIX

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class WebhookMetrics:
    """What the webhook counts of itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._requests = Counter(
            f"{PREFIX}_operator_webhook_requests_total",
            "Reviews by what became of them.",
            ("operation", "result"),
            registry=registry,
        )
        self._seconds = Histogram(
            f"{PREFIX}_operator_webhook_duration_seconds",
            "Duration of a review.",
            ("operation",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._expiry: Gauge | None = None

    def answered(self, operation: str, result: str, seconds: float) -> None:
        """A review has been answered."""
        operation = operation if operation in CHANGES else "other"
        self._requests.labels(operation, result).inc()
        self._seconds.labels(operation).observe(seconds)

    def certificate(self, expiry: float) -> None:
        """A certificate is served. Until one is, there is no such series: 0 would be a date."""
        if self._expiry is None:
            self._expiry = Gauge(
                f"{PREFIX}_operator_webhook_certificate_expiry_timestamp_seconds",
                "When the certificate that is served ends.",
                registry=self._registry,
            )
        self._expiry.set(expiry)
