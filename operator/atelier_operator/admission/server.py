"""The webhook's HTTPS server. Both replicas answer, whoever leads: each has the profiles in memory."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from atelier_operator.admission.certificate import ServerCertificate
from atelier_operator.admission.measure import WebhookMetrics
from atelier_operator.admission.review import Malformed, Review, Verdict, answer, read_review
from atelier_operator.admission.verdict import judge
from atelier_operator.profiles import Find
from atelier_operator.serving import served

log = logging.getLogger(__name__)

LARGEST_BYTES = 3 << 20
"""An object has at most 1.5 MiB in etcd, and a review of an update has two."""
SMALL_BYTES = 64 << 10
"""What is larger is parsed beside the loop."""
MOST_WAITING = 64
DEADLINE_SECONDS = 4.0
"""Before the API server's own, 5 s by default (chart: webhook.timeoutSeconds), so that the user is told."""

COLD = Verdict("cold", "stored unchecked: the operator has just started and has not read the profiles yet")
BUSY = Verdict("busy", "stored unchecked: the operator has too many runs to check at once")
LATE = Verdict("late", "stored unchecked: the check took too long")
ERROR = Verdict("error", "stored unchecked: the check itself has failed, see the operator's log")


class Webhook:
    """Answers reviews. `find` finds profiles, and is called in another thread; `is_warm`: whether they have all been read."""

    def __init__(self, find: Find, is_warm: Callable[[], bool], metrics: WebhookMetrics) -> None:
        self._find = find
        self._is_warm = is_warm
        self._metrics = metrics
        # A plan takes 0.3 ms, one with advice 3 ms; the loop, which renews the Lease, must not wait for one that takes longer.
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="webhook")
        self._waiting = 0

    def app(self) -> web.Application:
        """POST /validate."""
        app = web.Application(client_max_size=LARGEST_BYTES)
        app.router.add_post("/validate", self._validate)
        return app

    def close(self) -> None:
        self._planning.shutdown(wait=False, cancel_futures=True)

    async def _validate(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        operation, result = "", "malformed"
        try:
            body = await request.read()  # of more than LARGEST_BYTES: HTTP 413
            review = read_review(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(read_review, body)
            operation = review.operation
            verdict = await self._verdict(review)
            result = verdict.result
            text = json.dumps(answer(review.uid, verdict))
            return web.Response(text=text, content_type="application/json")
        except Malformed as error:
            return web.Response(text=f"{error}\n", status=400)
        finally:
            self._metrics.answered(operation, result, time.monotonic() - started)

    async def _verdict(self, review: Review) -> Verdict:
        if not self._is_warm():
            return COLD
        if self._waiting >= MOST_WAITING:
            return BUSY
        self._waiting += 1
        planned = asyncio.get_running_loop().run_in_executor(self._planning, judge, review, self._find)
        planned.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.shield(planned), DEADLINE_SECONDS)
        except TimeoutError:
            log.warning("a review took too long", extra={"run": review.name, "namespace": review.namespace})
            return LATE
        except Exception:
            log.exception("a review has failed", extra={"run": review.name, "namespace": review.namespace})
            return ERROR

    def _done(self, planned: "asyncio.Future[Verdict]") -> None:
        self._waiting -= 1
        if not planned.cancelled():
            planned.exception()  # one that came too late is nobody's any more


@contextlib.asynccontextmanager
async def webhook_served(webhook: Webhook, certificate: ServerCertificate, port: int) -> AsyncIterator[int]:
    """Serve, with the certificate that its files have at any time."""
    certificate.look()
    following = asyncio.create_task(certificate.follow())
    try:
        async with served(webhook.app(), port, certificate.context) as bound:
            yield bound
    finally:
        following.cancel()
        webhook.close()
