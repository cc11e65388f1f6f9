"""Ranks for the tests of the process group and of the helper that starts them."""

import os
import time
from datetime import timedelta
from typing import Any

from atelier_api.run_file import ExecutionPlan


def meet(plan: ExecutionPlan) -> dict[str, Any]:
    """Sum 1 and 2 over two ranks; then rank 0 waits for a rank that does not come."""
    import torch

    from atelier_runtime import parallel

    distributed = parallel.start(plan, timeout=timedelta(seconds=3))
    value = torch.tensor([distributed.rank + 1.0])
    torch.distributed.all_reduce(value)
    result = {"rank": distributed.rank, "sum": value.item(), "error": ""}
    if distributed.rank == 0:
        try:
            torch.distributed.all_reduce(value)
        except RuntimeError as error:
            result["error"] = str(error)
    else:
        time.sleep(6)
    return result


def fail_in_rank_one() -> None:
    print("about to fail")
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 breaks")


def hang() -> None:
    time.sleep(600)
