"""G11: the peak that the planner predicts against the one that a run has."""

import statistics
import traceback
from collections.abc import Callable
from typing import Any

from gauge import GIB, Gauge, Reading
from pairs import Findings, Row, at_most
from training import free_memory, ours
from workloads import Workload

from atelier_runtime import parallel


def measure(work: Workload, distributed: parallel.Distributed) -> dict[str, Any]:
    """Predicted and real bytes of live tensors, without what a process holds before it has a model."""
    gauge = Gauge(distributed.device, warm=2, timed=2, profiled=0)
    try:
        one = ours(work, gauge, distributed, compiled=False)
    except RuntimeError as error:  # out of memory too: the others still run
        traceback.print_exc()
        failed = f"{type(error).__name__}: {str(error)[:200]}"
        error.__traceback__ = None
        free_memory(distributed.device)
        return {"title": work.title, "failed": failed}
    reading: Reading = one["reading"]
    predicted = one["predicted"] - one["overhead"]
    free_memory(distributed.device)
    return {
        "title": work.title,
        "predicted": predicted,
        "allocated": reading.allocated,
        "reserved": reading.reserved,
        "device": reading.device,
        "overhead": one["overhead"],
        "error": predicted / reading.allocated - 1 if reading.allocated else 0.0,
    }


def run(
    works: tuple[Workload, ...], distributed: parallel.Distributed, tell: Callable[[dict[str, Any]], None]
) -> Findings:
    """`tell` is given every reading as it comes."""
    raw = []
    for work in works:
        raw.append(measure(work, distributed))
        tell(raw[-1])
    rows = [
        Row("G11", one["title"], one["failed"])
        if "failed" in one
        else Row(
            "G11",
            one["title"],
            f"predicted {one['predicted'] / GIB:.1f} GiB, peak {one['allocated'] / GIB:.1f} ({one['error']:+.1%}); allocator "
            f"{one['reserved'] / GIB:.1f}, the card {one['device'] / GIB:.1f}",
        )
        for one in raw
    ]
    errors = sorted(abs(one["error"]) for one in raw if "failed" not in one)
    if len(errors) > 1:
        p95 = statistics.quantiles(errors, n=20, method="inclusive")[-1]
        rows.append(Row("G11", "error, 95th percentile", f"{p95:.1%}", *at_most(p95, 0.03, "3 %")))
        lowest = min(one["predicted"] - one["allocated"] for one in raw if "failed" not in one)
        rows.append(Row("G11", "furthest below the real peak", f"{max(0, -lowest) / GIB:.2f} GiB", "≤ 1 GiB"))
    return Findings(rows, {"workloads": raw})
