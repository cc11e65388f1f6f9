"""The ends of pods on fake nodes, told as a kubelet and an agent would tell them."""

import contextlib
import json
import time
from typing import Any

from atelier_api.exit_codes import MEANINGS, ExitCode
from cluster.daemons import ClusterError
from operator_process import ClusterRun, until

Object = dict[str, Any]


def result(code: ExitCode, message: str = "", step: int = 3) -> str:
    """What an agent leaves as its termination message."""
    return json.dumps(
        {
            "exitCode": int(code),
            "reason": MEANINGS[code].reason,
            "message": message or MEANINGS[code].text,
            "attempt": "1.0",
            "time": time.time(),
            "step": step,
        }
    )


def both_pods(run: ClusterRun) -> list[Object]:
    """The two pods of a gang, once they run."""
    return list(until(lambda: pods if len(pods := run.pods()) == 2 else None, "two pods"))


def end_well(run: ClusterRun, step: int = 10) -> None:
    """The whole gang is done."""
    for pod in both_pods(run):
        run.end_pod(pod, int(ExitCode.DONE), result(ExitCode.DONE, step=step))


def end(run: ClusterRun, code: ExitCode, message: str = "") -> None:
    """Node 0 fails; its peer leaves as one that has lost it: a while later, as a real agent would, for Kubernetes judges the Job
    by any one of the pods that it finds failed. It may be gone by then."""
    first, second = both_pods(run)
    run.end_pod(first, int(code), result(code, message))
    time.sleep(1)
    with contextlib.suppress(ClusterError):
        run.end_pod(second, int(ExitCode.COLLECTIVE_TIMEOUT), result(ExitCode.COLLECTIVE_TIMEOUT))
