"""One writer at a time: a Lease that one replica holds. The others watch, with all they need in memory.

The Lease lasts 15 s by default and is renewed every 2 s. A leader that could not renew for 10 s stops writing, before anybody else
may take over; its clock is the monotonic one, so a process that was frozen knows it when it wakes. A request that hangs is given up
after 5 s, so that a leader tries twice at least and knows in time that it has lost the Lease. A Lease of another time has all of
these in proportion.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from atelier_operator.cluster import ApiError, Cluster
from atelier_operator.settings import Settings

log = logging.getLogger(__name__)

OF_THE_LEASE_TO_RENEW_IN = 2 / 3
OF_THE_LEASE_BETWEEN_RENEWALS = 2 / 15
OF_THE_LEASE_FOR_AN_ATTEMPT = 1 / 3

LABELS = {"app.kubernetes.io/name": "atelier", "app.kubernetes.io/component": "operator"}
"""By which `atelier install-check` finds the Lease, whatever the release is called."""


class Leadership:
    """Whether this replica may write."""

    def __init__(self, cluster: Cluster, settings: Settings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._settings = settings
        self._lease_seconds = settings.lease_seconds
        self._renew_seconds = settings.lease_seconds * OF_THE_LEASE_BETWEEN_RENEWALS
        self._attempt_seconds = settings.lease_seconds * OF_THE_LEASE_FOR_AN_ATTEMPT
        self._monotonic = monotonic
        self._renewed_at = float("-inf")
        self._seen: tuple[str, float] | None = None

    def holds(self) -> bool:
        """Whether this replica is the leader, by a renewal that is young enough."""
        return self._left() > 0

    async def follow(self, gained: Callable[[], None], lost: Callable[[], None]) -> None:
        """Try for the Lease for ever; tells when it is gained and lost."""
        leading = False
        while True:
            await self.attempt(min(self._attempt_seconds, self._left()) if leading else None)
            if self.holds() != leading:
                leading = not leading
                log.info("leader" if leading else "no leader any more", extra={"identity": self._settings.identity})
                (gained if leading else lost)()
            await asyncio.sleep(min(self._renew_seconds, self._left()) if leading else self._renew_seconds)

    async def attempt(self, seconds: float | None = None) -> None:
        """Renew the Lease, or take it when it is free, in so many seconds or not at all; None: in those of an attempt."""
        seconds = self._attempt_seconds if seconds is None else seconds
        started = self._monotonic()
        try:
            async with asyncio.timeout(seconds):
                taken = await self._take(datetime.now(UTC))
            if taken:
                self._renewed_at = started
        except TimeoutError:
            log.warning("the Lease cannot be renewed", extra={"error": f"no answer in {seconds:.1f} s"})
        except ApiError as error:
            if error.code != 409:  # 409: another replica was faster
                log.warning("the Lease cannot be renewed", extra={"error": str(error)})

    async def release(self) -> None:
        """Let another replica take over at once."""
        if not self.holds():
            return
        self._renewed_at = float("-inf")
        lease = await self._cluster.get("Lease", self._settings.lease_namespace, self._settings.lease_name)
        if lease is not None and (lease.get("spec") or {}).get("holderIdentity") == self._settings.identity:
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
            await self._cluster.replace(lease)

    def _left(self) -> float:
        """For how many seconds this replica may write without another renewal; none or fewer: it may not."""
        return self._renewed_at + self._lease_seconds * OF_THE_LEASE_TO_RENEW_IN - self._monotonic()

    async def _take(self, now: datetime) -> bool:
        namespace, name = self._settings.lease_namespace, self._settings.lease_name
        lease = await self._cluster.get("Lease", namespace, name)
        if lease is None:
            manifest = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": name, "namespace": namespace, "labels": LABELS},
                "spec": self._spec(now, 0),
            }
            await self._cluster.create(manifest)
            return True
        spec = lease.get("spec") or {}
        mine = spec.get("holderIdentity") == self._settings.identity
        if not mine and spec.get("holderIdentity") and not self._expired(lease):
            return False
        transitions = int(spec.get("leaseTransitions") or 0) + (0 if mine else 1)
        lease["spec"] = self._spec(now, transitions, spec.get("acquireTime") if mine else None)
        lease["metadata"]["labels"] = {**(lease["metadata"].get("labels") or {}), **LABELS}
        await self._cluster.replace(lease)
        return True

    def _expired(self, lease: dict[str, Any]) -> bool:
        """Whether the holder has not renewed for the Lease's time, by this replica's own clock: clocks of nodes differ."""
        version, now = lease["metadata"]["resourceVersion"], self._monotonic()
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > float((lease.get("spec") or {}).get("leaseDurationSeconds") or self._lease_seconds)

    def _spec(self, now: datetime, transitions: int, acquired: str | None = None) -> dict[str, Any]:
        text = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": math.ceil(self._lease_seconds),
            "acquireTime": acquired or text,
            "renewTime": text,
            "leaseTransitions": transitions,
        }
