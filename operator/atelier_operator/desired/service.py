"""The headless Service that gives the pods of an Indexed Job their names. A JobSet makes its own."""

from typing import Any

from atelier_operator.desired.order import Order
from atelier_operator.names import RENDEZVOUS_PORT


def service(order: Order) -> dict[str, Any] | None:
    """None for a JobSet. Names resolve before pods are ready: the rendezvous is what makes them so."""
    if order.backend == "jobset":
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": order.metadata(),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": order.labels,
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }
