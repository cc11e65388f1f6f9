"""G11: the peak that the planner predicts against the one that a run has."""

import functools
import statistics
from typing import Any

from gauge import GIB, Gauge
from pairs import Row, at_most
from training import Tell, attempt, ours
from workloads import Workload

from atelier_runtime import parallel


def measure(work: Workload, distributed: parallel.Distributed) -> dict[str, Any]:
    """Predicted and real bytes of live tensors, without what a process holds before it has a model.

    `error` is there where there is a GPU: on a CPU nobody counts the tensors.
    """
    gauge = Gauge(distributed.device, warm=2, timed=2, profiled=0)
    trained = attempt(functools.partial(ours, work, gauge, distributed), distributed.device)
    if isinstance(trained, str):
        return {"title": work.title, "failed": trained}
    parts, reading = trained.predicted, trained.reading
    assert parts is not None
    predicted = parts.total - parts.overhead
    found = {
        "title": work.title,
        "predicted": predicted,
        "allocated": reading.allocated,
        "reserved": reading.reserved,
        "device": reading.device,
        "overhead": parts.overhead,
    }
    return found | ({"error": predicted / reading.allocated - 1} if reading.allocated else {})


def run(works: tuple[Workload, ...], distributed: parallel.Distributed, tell: Tell) -> list[dict[str, Any]]:
    """Everything raw; `tell` is given every row as it comes."""
    raw = []
    for work in works:
        raw.append(measure(work, distributed))
        tell(_row(raw[-1]))
    compared = [one for one in raw if "error" in one]
    if len(compared) > 1:
        p95 = statistics.quantiles((abs(one["error"]) for one in compared), n=20, method="inclusive")[-1]
        tell(Row("G11", "error, 95th percentile", f"{p95:.1%}", *at_most(p95, 0.03, "3 %")))
        below = max(0.0, *((one["allocated"] - one["predicted"]) / GIB for one in compared))
        tell(Row("G11", "furthest below the real peak", f"{below:.2f} GiB", *at_most(below, 1.0, "1 GiB")))
    return raw


def _row(one: dict[str, Any]) -> Row:
    if "failed" in one:
        return Row("G11", one["title"], one["failed"])
    measured = f"predicted {one['predicted'] / GIB:.1f} GiB"
    if "error" in one:
        measured += (
            f", peak {one['allocated'] / GIB:.1f} ({one['error']:+.1%}); allocator {one['reserved'] / GIB:.1f}, "
            f"the card {one['device'] / GIB:.1f}"
        )
    return Row("G11", one["title"], measured)
