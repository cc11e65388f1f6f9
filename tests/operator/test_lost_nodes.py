"""A pass over a run with a pod on a dead node: which nodes are asked for, and what is deleted how."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from atelier_operator.times import format_time
from operator_life import Life

Object = dict[str, Any]


def dead_node(life: Life, *, ready: str = "Unknown") -> None:
    """The node of pod 1 answers no more, and its pod was to be gone a minute ago."""
    taints = [{"key": "node.kubernetes.io/unreachable"}]
    status = {"conditions": [{"type": "Ready", "status": ready}]}
    life.cluster.make(
        {"kind": "Node", "metadata": {"name": "gpu-1", "namespace": ""}, "spec": {"taints": taints}, "status": status}
    )
    gone_by = format_time(life.now - timedelta(seconds=60))
    to_go: Object = {"deletionTimestamp": gone_by, "deletionGracePeriodSeconds": 30}
    life.cluster.edit("Pod", "knight-1-0-1", lambda pod: pod["metadata"].update(to_go))


def trained() -> Life:
    life = Life()
    life.start()
    asyncio.run(life.rest())
    life.train("knight-1", "1.0", 10)
    asyncio.run(life.rest())
    return life


@pytest.mark.parametrize("ready", ["Unknown", "True"])
def test_only_pods_on_lost_nodes_are_removed_by_force(ready: str) -> None:
    life = trained()
    dead_node(life, ready=ready)
    life.cluster.calls.clear()
    asyncio.run(life.look())
    deleted = [(kind, name) for verb, kind, name in life.cluster.calls if verb == "DELETE"]
    assert deleted == ([("Pod", "knight-1-0-1"), ("JobSet", "knight-1")] if ready == "Unknown" else [])
    assert life.cluster.forced == ({"knight-1-0-1"} if ready == "Unknown" else set())
    assert ("GET", "Node", "gpu-1") in life.cluster.calls


def test_nodes_are_not_asked_for_without_need_or_right() -> None:
    life = trained()
    asyncio.run(life.look())
    life.may_see_nodes = False
    dead_node(life)
    life.start()
    for _ in range(3):
        asyncio.run(life.look())
    assert "Node" not in {kind for _, kind, _ in life.cluster.calls}
    assert life.status["phase"] == "Running"
