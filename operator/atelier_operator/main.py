"""The operator's process: kopf's watches fill the inventory and wake runs; the queue reconciles them while this replica leads.

    kopf run -m atelier_operator.main --standalone …      (see `python -m atelier_operator`)

Only `on.event` handlers and our own inventory: no state on objects, no finalizers, no timers per object; and no index of kopf's, whose
first filling wakes every object for each other one (5,000 took 137 s).
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kopf

from atelier_api.log import setup_logging
from atelier_operator.admission.certificate import ServerCertificate
from atelier_operator.admission.measure import WebhookMetrics
from atelier_operator.admission.server import Webhook, webhook_served
from atelier_operator.cluster import KINDS, ApiError, Cluster, LostLeadership
from atelier_operator.inventory import Inventory, Key
from atelier_operator.leadership import Leadership
from atelier_operator.metrics import Metrics
from atelier_operator.names import GROUP
from atelier_operator.observed import Apis
from atelier_operator.polling import Poller
from atelier_operator.reconcile import Reconciler
from atelier_operator.serving import plain_app, served
from atelier_operator.settings import Settings
from atelier_operator.watched import served_kinds, watched_kinds, watched_namespaces
from atelier_operator.work_queue import WorkQueue

log = logging.getLogger(__name__)

DISCOVERY_SECONDS = 30.0
COMPARED_A_SECOND = 30
"""Objects listed to find what has gone unnoticed, on the average: every look in a small cluster, minutes apart in a large one."""
SETTLE_SECONDS = 0.5
"""Changes of children and pods come in bursts: they are looked at together, so that what lasts for a moment is not written.
A run that somebody has changed is looked at at once."""

PHASES = (
    *("Pending", "Queued", "Preparing", "Running", "Suspended", "Recovering"),
    *("Publishing", "Succeeded", "Failed"),
)


class Operator:
    """Everything that lives as long as the process."""

    def __init__(self, settings: Settings, cluster: Cluster, metrics: Metrics) -> None:
        self.inventory = Inventory()
        self.metrics = metrics
        self._settings = settings
        self._cluster = cluster
        self.queue = WorkQueue(self._work)
        self._leadership = Leadership(cluster, settings)
        self._poller = Poller(settings.progress_seconds, self.queue.wake)
        self._reconciler = Reconciler(
            cluster,
            self.inventory,
            self._poller,
            clock=lambda: datetime.now(UTC),
            may_see_nodes=not settings.namespaces,
        )
        cluster.may_write = self._leadership.holds
        self._tasks: list[asyncio.Task[Any]] = []
        self.has_listed = False

    async def start(self) -> None:
        """Read everything once, so that no run is judged before all is known of it; then follow the Lease and the APIs."""
        await self._discover()
        for kind, selector in served_kinds(self._settings, self._reconciler.apis).items():
            for namespace in watched_namespaces(self._settings, kind):
                for raw in await self._cluster.list(kind, namespace, selector):
                    self.inventory.put(kind, raw)
        self.has_listed = True
        self.queue.start()
        self._tasks = [
            asyncio.create_task(self._leadership.follow(self._gained, self._lost)),
            asyncio.create_task(self._look_around()),
        ]

    async def stop(self) -> None:
        """Stop writing, let go of the Lease."""
        self.queue.close()
        for task in self._tasks:
            task.cancel()
        await self.queue.stop()
        await self._poller.close()
        with contextlib.suppress(ApiError):
            await self._leadership.release()
        await self._cluster.close()

    def take(self, kind: str, event: Mapping[str, Any]) -> None:
        """An object has come, changed or gone."""
        raw = event["object"]
        self.metrics.event(kind, time.time())
        gone = event.get("type") == "DELETED"
        at_once = kind == "TrainingRun" and (gone or self._is_news(raw))
        key = self.inventory.remove(kind, raw) if gone else self.inventory.put(kind, raw)
        if gone and kind == "TrainingRun" and key is not None:
            self.queue.forget(key)
        if kind in ("TrainingProfile", "ClusterTrainingProfile"):
            metadata = raw["metadata"]
            for run in list(self.inventory.using_profile(kind, metadata.get("namespace") or "", metadata["name"])):
                self.queue.wake(run)
        elif key is not None and at_once:
            self.queue.wake(key)
        elif key is not None:
            self.queue.wake_after(key, SETTLE_SECONDS)

    def _is_news(self, raw: Mapping[str, Any]) -> bool:
        """Whether somebody else has made or changed the run: our own statuses come back as events as well."""
        metadata = raw["metadata"]
        known = (self.inventory.run((metadata["namespace"], metadata["name"])) or {}).get("metadata") or {}
        return any(known.get(field) != metadata.get(field) for field in ("uid", "generation", "deletionTimestamp"))

    async def _work(self, key: Key) -> float | None:
        started = time.monotonic()
        try:
            after = await self._reconciler.reconcile(key)
        except LostLeadership:
            self.queue.close()
            return 0.0
        except Exception:
            self.metrics.reconciled("error", time.monotonic() - started)
            raise
        self.metrics.reconciled("ok", time.monotonic() - started)
        return after

    def _gained(self) -> None:
        self.metrics.leader(True)
        self._wake_all()
        self.queue.open()

    def _lost(self) -> None:
        self.metrics.leader(False)
        self.queue.close()

    async def _look_around(self) -> None:
        """Discovery, what has gone without a watch having told so, and from time to time every run once more."""
        compare_at, resync_at = 0.0, time.monotonic() + self._settings.resync_seconds
        while True:
            await asyncio.sleep(DISCOVERY_SECONDS)
            began = time.monotonic()
            try:
                await self._discover()
                if began > compare_at:
                    compare_at = began + await self._compare() / COMPARED_A_SECOND
            except ApiError as error:
                log.warning("the cluster cannot be listed", extra={"error": str(error)})
            self._count()
            if began > resync_at:
                resync_at = began + self._settings.resync_seconds
                self._wake_all()

    async def _discover(self) -> None:
        apis = Apis(jobset=await self._cluster.serves("JobSet"), kueue=await self._cluster.serves("Workload"))
        if apis != self._reconciler.apis:
            log.info("engines of the cluster", extra={"jobset": apis.jobset, "kueue": apis.kueue})
            self._reconciler.apis = apis
            self._wake_all()

    def _wake_all(self) -> None:
        """Look at every run."""
        for key in self.inventory.runs():
            self.queue.wake(key)

    async def _compare(self) -> int:
        """Forget what is gone. A watch that begins anew, after 410 Gone, tells what is there and not what went meanwhile. Gives the
        number of objects that are there."""
        count = 0
        for kind, selector in served_kinds(self._settings, self._reconciler.apis).items():
            for namespace in watched_namespaces(self._settings, kind):
                known = self.inventory.names(kind, namespace)
                there = await self._cluster.list(kind, namespace, selector)
                count += len(there)
                for run in self.inventory.keep(kind, known, there):
                    log.info("gone unnoticed", extra={"kind": kind, "run": run[1], "namespace": run[0]})
                    if kind == "TrainingRun":
                        self.queue.forget(run)
                    self.queue.wake(run)
        return count

    def _count(self) -> None:
        found = (self.inventory.run(key) or {} for key in self.inventory.runs())
        phases = Counter((raw.get("status") or {}).get("phase") or "Pending" for raw in found)
        self.metrics.runs({phase: phases.get(phase, 0) for phase in PHASES})
        self.metrics.queue(len(self.queue))


def register(registry: kopf.OperatorRegistry, operator: Operator, settings: Settings) -> None:
    """The watches. Objects of others are selected by label on the server, so that not every Pod comes here."""
    for kind, selector in watched_kinds(settings).items():

        async def handle(event: Mapping[str, Any], kind: str = kind, **_: Any) -> None:
            operator.take(kind, event)

        place = KINDS[kind]
        labels = {selector: kopf.PRESENT} if selector else None
        kopf.on.event(place.group, place.version, place.plural, labels=labels, registry=registry, id=kind)(handle)

    async def log_in(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    kopf.on.login(registry=registry)(log_in)


def configure(settings: kopf.OperatorSettings, silence_seconds: float) -> None:
    """kopf's settings; each has its reason in docs/decisions/0011-decide-from-what-is-there.md."""
    settings.posting.loggers = False
    settings.posting.level = logging.WARNING
    settings.persistence.finalizer = f"{GROUP}/unused"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 5
    settings.watching.inactivity_timeout = silence_seconds
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = (1, 1, 2, 3, *[5] * 10)  # kopf's own grow to 21 s, in which nothing is seen
    settings.peering.standalone = True


@contextlib.asynccontextmanager
async def servers(settings: Settings, operator: Operator, metrics: Metrics) -> AsyncIterator[None]:
    """Metrics and probes, and the webhook where there is one. They answer from the first moment on, and on every replica."""
    async with contextlib.AsyncExitStack() as stack:
        plain = plain_app(metrics.registry, lambda: operator.has_listed)
        await stack.enter_async_context(served(plain, settings.metrics_port))
        if settings.webhook_port:
            counts = WebhookMetrics(metrics.registry)
            webhook = Webhook(operator.inventory.profile, lambda: operator.has_listed, counts)
            certificate = ServerCertificate(Path(settings.webhook_certificates), counts.certificate)
            await stack.enter_async_context(webhook_served(webhook, certificate, settings.webhook_port))
        yield


def end_at_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    metrics = Metrics()
    cluster = await Cluster.connect(metrics.request)
    operator = Operator(settings, cluster, metrics)
    registry = kopf.OperatorRegistry()
    register(registry, operator, settings)

    async def hear_signals(**_: Any) -> None:
        """Again: kopf has put its own handlers in the place of ours when it began."""
        end_at_signals(stop)

    kopf.on.startup(registry=registry)(hear_signals)
    kopf_settings = kopf.OperatorSettings()
    configure(kopf_settings, settings.silence_seconds)
    kopf_settings.scanning.disabled = bool(settings.namespaces)
    async with servers(settings, operator, metrics):
        await operator.start()
        told = asyncio.create_task(stop.wait())
        watches = asyncio.create_task(
            kopf.operator(
                registry=registry,
                settings=kopf_settings,
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
            )
        )
        try:
            await asyncio.wait({told, watches}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Before kopf, which waits 5 s for every task that is not its own: for so long nobody else could take the Lease.
            told.cancel()
            await operator.stop()
            watches.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watches


def main() -> None:
    """Entry point of the image."""
    setup_logging()
    try:
        settings = Settings.of(os.environ)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None

    async def serve() -> None:
        stop = asyncio.Event()
        end_at_signals(stop)
        await run(settings, stop)

    asyncio.run(serve())
