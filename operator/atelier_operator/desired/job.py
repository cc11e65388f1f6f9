"""The Indexed Job of an attempt: the child itself where JobSet is not served, and the template inside a JobSet."""

from typing import Any

from atelier_operator.desired.order import Order
from atelier_operator.desired.pod import pod_template
from atelier_operator.names import PLAN_ANNOTATION, STEPS_ANNOTATION


def job(order: Order) -> dict[str, Any]:
    """The Job as a child."""
    metadata = order.metadata() | {"annotations": annotations(order)}
    metadata["labels"] = order.labels | order.queue_labels
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_spec(order)}


def job_spec(order: Order) -> dict[str, Any]:
    """One pod per node, each with its index. The first pod that fails fails the Job, and with it the gang.

    The failure's message names the exit code (rule 1) or the disruption (rule 0): the restart rules of a JobSet, and the
    operator, read it there. The order counts: an evicted pod has an exit code as well.
    """
    nodes = order.run_file.plan.nodes
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}},
            ]
        },
        "template": pod_template(order),
    }


def annotations(order: Order) -> dict[str, str]:
    """What an operator that comes back must know of an attempt it did not see made."""
    return {
        STEPS_ANNOTATION: str(order.run_file.spec.hyperparameters.steps),
        PLAN_ANNOTATION: order.run_file.plan.model_dump_json(by_alias=True),
    }
