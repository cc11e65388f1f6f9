"""The admission webhook over TLS, in a process of its own: new runs that fit, and runs that are refused with advice.

One client that keeps its connection, as the API server does, asks one review after another.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pairs import Findings, Row, quantiles
from prometheus_client import CollectorRegistry

from atelier_operator.admission.certificate import CERTIFICATE, ServerCertificate
from atelier_operator.admission.measure import WebhookMetrics
from atelier_operator.admission.server import Webhook, webhook_served
from reviews import profiles, review
from run_stories import raw_run
from tls import make_pair

REVIEWS = 1000
WARM_UP = 20
TOO_LARGE: dict[str, Any] = {"model": {"family": "flux"}, "adapter": {"type": "full"}}


def run(*, quick: bool) -> Findings:
    """Half of the reviews are of either kind."""
    number = 100 if quick else REVIEWS
    folder = Path(tempfile.mkdtemp(prefix="webhook-"))
    try:
        make_pair(folder).write(folder)
        command = [sys.executable, __file__, str(folder)]
        found_by = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE}
        with subprocess.Popen(command, text=True, env=found_by, **pipes) as server:
            assert server.stdout is not None
            found = _measure(folder, int(server.stdout.readline()), number)
            server.communicate()  # its standard input ends, and so does it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Findings(_rows(found), found)


def _measure(folder: Path, port: int, number: int) -> dict[str, Any]:
    client = ssl.create_default_context(cafile=str(folder / CERTIFICATE))
    with contextlib.closing(http.client.HTTPSConnection("127.0.0.1", port, context=client, timeout=30)) as connection:
        bodies = {True: json.dumps(review(raw_run())), False: json.dumps(review(raw_run(**TOO_LARGE)))}
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for each in range(WARM_UP + number):
            fits = each % 2 == 0
            started = time.perf_counter()
            connection.request("POST", "/validate", bodies[fits], {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            taken = time.perf_counter() - started
            assert answer["response"]["allowed"] is fits
            if each >= WARM_UP:
                seconds[fits].append(taken)
    return {"reviews": number, "allowed_seconds": seconds[True], "refused_seconds": seconds[False]}


def _rows(found: dict[str, Any]) -> list[Row]:
    both = [*found["allowed_seconds"], *found["refused_seconds"]]
    standing = "met" if quantiles(both)[1] <= 0.02 else "missed"
    rows = [Row("W", f"{found['reviews']} reviews", _told(both), "p99 ≤ 20 ms", standing)]
    for name in ("allowed", "refused"):
        rows.append(Row("W", f"those that are {name}", _told(found[f"{name}_seconds"])))
    return [*rows, Row("W", "one after another", f"{len(both) / sum(both):.0f}/s")]


def _told(seconds: list[float]) -> str:
    middle, high = quantiles(seconds)
    return f"p50 {middle * 1e3:.1f} ms, p99 {high * 1e3:.1f} ms"


async def serve(folder: Path) -> None:
    """Print the port; serve until standard input ends."""
    metrics = WebhookMetrics(CollectorRegistry())
    webhook = Webhook(profiles(), lambda: True, metrics)
    async with webhook_served(webhook, ServerCertificate(folder, metrics.certificate), 0) as port:
        print(port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    asyncio.run(serve(parser.parse_args().folder))
