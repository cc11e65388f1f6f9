"""The ConfigMap of an attempt: its RunFile, and what it was made from."""

from typing import Any

from atelier_operator.desired.order import Order
from atelier_operator.names import RUN_FILE_KEY, SNAPSHOT_KEY
from atelier_operator.snapshot import text_of


def config_map(order: Order) -> dict[str, Any]:
    """Immutable: a live attempt keeps what it was started with."""
    text = order.run_file.model_dump_json(by_alias=True, indent=2) + "\n"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": order.metadata(),
        "immutable": True,
        "data": {RUN_FILE_KEY: text, SNAPSHOT_KEY: text_of(order.snapshot)},
    }
