"""The JobSet of an attempt: restarts the whole gang by rules that work while the operator is down."""

from typing import Any

from atelier_operator.desired.job import annotations, job_spec
from atelier_operator.desired.order import Order
from atelier_operator.exit_rules import FINAL_CODES, UNCOUNTED_CODES
from atelier_operator.names import REPLICATED_JOB


def jobset(order: Order) -> dict[str, Any]:
    """Never sends `suspend`: with a queue label that field is Kueue's."""
    metadata = order.metadata() | {"annotations": annotations(order)}
    metadata["labels"] = order.labels | order.queue_labels
    node = {
        "name": REPLICATED_JOB,
        "replicas": 1,
        "template": {"metadata": {"labels": order.labels}, "spec": job_spec(order)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "replicatedJobs": [node],
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": order.restarts_left, "rules": list(_rules())},
        },
    }


def _rules() -> list[dict[str, Any]]:
    """First match decides; what no rule names is a counted restart. Patterns are not anchored, hence the words around the code."""
    return [
        _rule("final", "FailJobSet", f"failed with exit code ({_codes(FINAL_CODES)}) matching"),
        _rule(
            "uncounted",
            "RestartJobSetAndIgnoreMaxRestarts",
            f"failed with exit code ({_codes(UNCOUNTED_CODES)}) matching",
            "has condition DisruptionTarget matching",
        ),
    ]


def _rule(name: str, action: str, *patterns: str) -> dict[str, Any]:
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": list(patterns),
    }


def _codes(codes: tuple[int, ...]) -> str:
    return "|".join(map(str, codes))
