"""AdmissionReviews for tests, as the API server sends them, and a webhook that answers them over HTTP."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry

from atelier_operator.admission.measure import WebhookMetrics
from atelier_operator.admission.review import Review, read_review
from atelier_operator.admission.server import Webhook
from atelier_operator.serving import served
from run_stories import PROFILE

Object = dict[str, Any]

REVIEW_UID = "705ab4f5-6393-11e8-b7cc-42010a800002"


def review(run: Object, before: Object | None = None, **request: Any) -> Object:
    """The question whether a run may be made, or changed from what it was `before`."""
    return {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": REVIEW_UID,
            "kind": {"group": "atelier.dev", "version": "v1alpha1", "kind": "TrainingRun"},
            "resource": {"group": "atelier.dev", "version": "v1alpha1", "resource": "trainingruns"},
            "name": "knight",
            "namespace": "art",
            "operation": "UPDATE" if before else "CREATE",
            "object": run,
            "oldObject": before,
            "dryRun": False,
            **request,
        },
    }


def read(question: Object) -> Review:
    """The question, as the webhook reads it from the wire."""
    return read_review(json.dumps(question).encode())


def profiles(**changes: Any) -> "Profiles":
    """The ClusterTrainingProfile `default`, with top-level fields replaced."""
    return Profiles({("ClusterTrainingProfile", "default"): {"spec": PROFILE | changes}})


class Profiles(dict[tuple[str, str], Object]):
    """Finds profiles as the inventory does."""

    def __call__(self, kind: str, namespace: str, name: str) -> Mapping[str, Any] | None:
        return self.get((kind, name))


class Asked:
    """A webhook on loopback without TLS. `find` is how it finds profiles, and may be replaced."""

    def __init__(self, session: aiohttp.ClientSession, port: int, registry: CollectorRegistry) -> None:
        self._session = session
        self.url = f"http://127.0.0.1:{port}/validate"
        self.registry = registry

    async def post(self, **body: Any) -> tuple[int, str]:
        """Status and text."""
        async with self._session.post(self.url, **body) as response:
            return response.status, await response.text()

    async def ask(self, question: Object) -> Object:
        """The response inside the AdmissionReview that comes back."""
        async with self._session.post(self.url, json=question) as response:
            assert response.status == 200, await response.text()
            answered: Object = await response.json()
        assert (answered["apiVersion"], answered["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
        assert answered["response"]["uid"] == question["request"]["uid"]
        return dict(answered["response"])

    def count(self, operation: str, result: str) -> float:
        """How many reviews the metrics have."""
        labels = {"operation": operation, "result": result}
        return self.registry.get_sample_value("atelier_operator_webhook_requests_total", labels) or 0.0


@contextlib.asynccontextmanager
async def asked(find: Any = None, *, warm: bool = True) -> AsyncIterator[Asked]:
    """A webhook with the profiles of `find`."""
    registry = CollectorRegistry()
    webhook = Webhook(find or profiles(), lambda: warm, WebhookMetrics(registry))
    try:
        async with served(webhook.app(), 0) as port, aiohttp.ClientSession() as session:
            yield Asked(session, port, registry)
    finally:
        webhook.close()
