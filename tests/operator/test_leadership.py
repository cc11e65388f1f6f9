"""One writer at a time: two replicas and one Lease, with a clock that the test moves."""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from atelier_operator.cluster import ApiError, Cluster
from atelier_operator.leadership import Leadership
from atelier_operator.settings import Settings

Object = dict[str, Any]


class OneLease:
    """The part of `Cluster` that leadership uses, with one object and the API server's conflicts."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0
        self.down = self.hangs = False
        self.writes: list[str] = []

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        self._check()
        if self.hangs:
            await asyncio.Event().wait()
        assert (kind, namespace, name) == ("Lease", "system", "atelier-operator")
        await asyncio.sleep(0)
        return copy.deepcopy(self.lease)

    async def create(self, manifest: Object) -> Object:
        self._check()
        if self.lease is not None:
            raise ApiError(409, "exists")
        return self._store(manifest)

    async def replace(self, manifest: Object) -> Object:
        self._check()
        if self.lease is None or manifest["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "changed")
        return self._store(manifest)

    def _check(self) -> None:
        if self.down:
            raise ApiError(0, "no answer")

    def _store(self, manifest: Object) -> Object:
        self.version += 1
        self.lease = copy.deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        self.writes.append(self.lease["spec"]["holderIdentity"])
        return copy.deepcopy(self.lease)


class Clock:
    """Monotonic seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Pair:
    """Two replicas, each with its own clock."""

    def __init__(self) -> None:
        self.cluster = OneLease()
        self.clocks = {"a": Clock(), "b": Clock()}
        self.a, self.b = (self._replica(name) for name in "ab")

    def _replica(self, name: str) -> Leadership:
        settings = Settings(lease_namespace="system", identity=name)
        return Leadership(cast(Cluster, self.cluster), settings, self.clocks[name])

    def wait(self, seconds: float, *names: str) -> None:
        for name in names or ("a", "b"):
            self.clocks[name].now += seconds

    @property
    def spec(self) -> Object:
        assert self.cluster.lease is not None
        spec: Object = self.cluster.lease["spec"]
        return spec


def with_pair(story: Callable[[Pair], Awaitable[None]]) -> None:
    asyncio.run(_tell(story))


async def _tell(story: Callable[[Pair], Awaitable[None]]) -> None:
    await story(Pair())


def test_the_first_to_come_leads_and_the_other_waits() -> None:
    async def story(pair: Pair) -> None:
        assert not pair.a.holds()
        await pair.a.attempt()
        await pair.b.attempt()
        assert (pair.a.holds(), pair.b.holds()) == (True, False)
        assert (pair.spec["holderIdentity"], pair.spec["leaseDurationSeconds"]) == ("a", 15)
        assert pair.cluster.writes == ["a"]

    with_pair(story)


def test_two_that_come_at_once_do_not_both_lead() -> None:
    async def story(pair: Pair) -> None:
        await asyncio.gather(pair.a.attempt(), pair.b.attempt())
        assert [pair.a.holds(), pair.b.holds()].count(True) == 1

    with_pair(story)


def test_two_that_take_a_free_lease_at_once_do_not_both_lead() -> None:
    async def story(pair: Pair) -> None:
        await pair.a.attempt()
        await pair.a.release()
        await asyncio.gather(pair.a.attempt(), pair.b.attempt())
        assert [pair.a.holds(), pair.b.holds()].count(True) == 1

    with_pair(story)


def test_a_leader_that_renews_stays_one() -> None:
    async def story(pair: Pair) -> None:
        for _ in range(60):
            await pair.a.attempt()
            await pair.b.attempt()
            pair.wait(2)
        assert (pair.a.holds(), pair.b.holds()) == (True, False)
        assert pair.spec["leaseTransitions"] == 0
        assert pair.spec["acquireTime"] <= pair.spec["renewTime"]

    with_pair(story)


def test_a_leader_without_the_api_stops_before_another_may_begin() -> None:
    """At no second do both hold the Lease, and the gap is short."""

    async def story(pair: Pair) -> None:
        await pair.a.attempt()
        held: list[tuple[bool, bool]] = []
        for _ in range(25):
            pair.cluster.down = True
            await pair.a.attempt()
            pair.cluster.down = False
            await pair.b.attempt()
            held.append((pair.a.holds(), pair.b.holds()))
            pair.wait(1)
        assert (True, True) not in held
        assert held[0] == (True, False)
        assert held[10] == (False, False)
        assert held[16] == (False, True)
        assert pair.spec["leaseTransitions"] == 1

    with_pair(story)


def test_a_leader_that_was_frozen_knows_it_when_it_wakes_and_does_not_take_the_lease_back() -> None:
    async def story(pair: Pair) -> None:
        await pair.a.attempt()
        await pair.b.attempt()  # sees the Lease for the first time
        pair.wait(16)
        await pair.b.attempt()
        assert pair.b.holds()
        assert not pair.a.holds(), "before it has asked anybody"
        await pair.a.attempt()
        assert (pair.a.holds(), pair.spec["holderIdentity"]) == (False, "b")

    with_pair(story)


def test_a_renewal_that_took_too_long_is_none() -> None:
    """Counted from before the request: the Lease may have run out while the answer was on its way."""

    async def story(pair: Pair) -> None:
        store = pair.cluster._store

        def slow(manifest: Object) -> Object:
            pair.wait(11, "a")
            return store(manifest)

        pair.cluster._store = slow  # type: ignore[method-assign]
        await pair.a.attempt()
        assert not pair.a.holds()

    with_pair(story)


def test_another_replicas_clock_does_not_matter() -> None:
    """The times in the Lease are not read: a clock that is an hour ahead does not make it look expired."""

    async def story(pair: Pair) -> None:
        await pair.a.attempt()
        assert pair.cluster.lease is not None
        pair.cluster.lease["spec"]["renewTime"] = "2001-01-01T00:00:00.000000Z"
        await pair.b.attempt()
        assert not pair.b.holds()

    with_pair(story)


def test_a_released_lease_is_taken_at_once() -> None:
    async def story(pair: Pair) -> None:
        await pair.a.attempt()
        await pair.a.release()
        assert not pair.a.holds()
        await pair.b.attempt()
        assert pair.b.holds()

    with_pair(story)


def test_who_does_not_lead_releases_nothing() -> None:
    async def story(pair: Pair) -> None:
        await pair.a.attempt()
        await pair.b.release()
        assert pair.cluster.writes == ["a"]

    with_pair(story)


def test_a_lease_that_somebody_made_empty_is_taken() -> None:
    async def story(pair: Pair) -> None:
        metadata = {"name": "atelier-operator", "namespace": "system", "resourceVersion": "0"}
        pair.cluster.lease = {"metadata": metadata}
        await pair.a.attempt()
        assert pair.a.holds()

    with_pair(story)


def test_gains_and_losses_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        told: list[str] = []
        rounds = 0

        async def passes(seconds: float) -> None:
            nonlocal rounds
            rounds += 1
            pair.wait(seconds)
            pair.cluster.down = 3 <= rounds < 10
            if rounds == 12:
                raise asyncio.CancelledError

        monkeypatch.setattr("atelier_operator.leadership.asyncio.sleep", passes)
        monkeypatch.setattr(pair.cluster, "get", _at_once(pair.cluster))
        with pytest.raises(asyncio.CancelledError):
            await pair.a.follow(lambda: told.append("gained"), lambda: told.append("lost"))
        assert told == ["gained", "lost", "gained"]

    with_pair(story)


def _at_once(cluster: OneLease) -> Callable[..., Awaitable[Object | None]]:
    async def get(kind: str, namespace: str, name: str) -> Object | None:
        cluster._check()
        return copy.deepcopy(cluster.lease)

    return get


def test_a_leader_whose_requests_hang_is_told_that_it_has_lost() -> None:
    async def story() -> None:
        lease, gained, lost = OneLease(), asyncio.Event(), asyncio.Event()
        settings = Settings(lease_namespace="system", identity="a", lease_seconds=0.75)
        replica = Leadership(cast(Cluster, lease), settings)
        following = asyncio.create_task(replica.follow(gained.set, lost.set))
        await asyncio.wait_for(gained.wait(), 60)
        lease.hangs = True
        await asyncio.wait_for(lost.wait(), 60)
        assert not replica.holds()
        lease.hangs = False
        gained.clear()
        await asyncio.wait_for(gained.wait(), 60)
        following.cancel()

    asyncio.run(story())
