"""Fixtures of real clusters. A test module takes them with `pytest_plugins = ("cluster_fixtures",)` and sets a long timeout,
because the first one on a machine builds Kubernetes (`make cluster` does that beforehand).
"""

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import pytest

from atelier_api.crdgen import resources
from cluster import buildah
from cluster.buildah import BuiltImage
from cluster.local import Cluster, why_not
from go_build import NoGo

FAKE_NODES, FAKE_GPUS = 4, 8


@pytest.fixture(scope="session")
def cluster_report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line at once, past pytest's capture: a build takes minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"==> {line}", flush=True)

    return show


@pytest.fixture(scope="session")
def start_cluster(cluster_report: Callable[[str], None]) -> Callable[..., Cluster]:
    """`Cluster.start`, which skips the test on a machine that cannot have the cluster. A build that fails is no reason to skip."""

    def start(**settings: Any) -> Cluster:
        if (reason := why_not(nodes=settings.get("nodes", 0))) is not None:
            pytest.skip(reason)
        try:
            return Cluster.start(report=cluster_report, **settings)
        except NoGo as error:
            pytest.skip(str(error))

    return start


class KeptClusters:
    """Clusters with four fake nodes of eight GPUs and our kinds, by whether they have JobSet and Kueue."""

    def __init__(self, start: Callable[..., Cluster], later: Callable[[], set["Kind"]]) -> None:
        """`later`: which kinds the tests from now on want."""
        self._start, self._later = start, later
        self._clusters: dict[Kind, Cluster] = {}

    def get(self, kind: "Kind") -> Cluster:
        """The cluster of the kind; another one where something of it has ended."""
        self.keep_only(self._later())
        known = self._clusters.get(kind)
        if known is not None and all(known.processes().values()):
            return known
        self.keep_only(self._clusters.keys() - {kind})
        jobset, kueue = kind
        crds = [resource.path for resource in resources()]
        cluster = self._start(kwok=FAKE_NODES, gpus_per_node=FAKE_GPUS, jobset=jobset, kueue=kueue, crds=crds)
        self._clusters[kind] = cluster
        return cluster

    def keep_only(self, kinds: Set["Kind"]) -> None:
        """Take all others down."""
        for kind in self._clusters.keys() - kinds:
            self._clusters.pop(kind).down()


Kind = tuple[bool, bool]
_KEPT = pytest.StashKey[KeptClusters]()
_NOW = pytest.StashKey[pytest.Item]()


@pytest.fixture(scope="session")
def kept_clusters(start_cluster: Callable[..., Cluster], request: pytest.FixtureRequest) -> Iterator[KeptClusters]:
    """Shared by modules that follow each other. An idle cluster takes a thirtieth of a core, so each goes after its last test."""
    stash, items = request.session.stash, request.session.items
    kept = stash[_KEPT] = KeptClusters(start_cluster, lambda: kinds_of(items[items.index(stash[_NOW]) :]))
    yield kept
    kept.keep_only(set())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.session.stash[_NOW] = item


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the fixtures of a module: another kind of it takes the place of its last one later, when `get` is called."""
    yield
    if (kept := item.session.stash.get(_KEPT, None)) is not None and (nextitem is None or not kinds_of([nextitem])):
        kept.keep_only(set())


def kinds_of(items: Iterable[pytest.Item]) -> set[Kind]:
    """The kept clusters that tests ask for: without `engines` the one that has both."""
    ours = [each for each in items if isinstance(each, pytest.Function) and "kept_clusters" in each.fixturenames]
    chosen = [each.callspec.params.get("engines") if hasattr(each, "callspec") else None for each in ours]
    return {(engines.jobset, engines.kueue) if engines else (True, True) for engines in chosen}


@pytest.fixture(scope="module")
def fake_cluster(kept_clusters: KeptClusters) -> Cluster:
    """A control plane with JobSet, Kueue, our kinds and four fake nodes of eight GPUs. Other modules use it before and after: a
    test has a namespace of its own, and takes away what lies in none."""
    return kept_clusters.get((True, True))


@pytest.fixture(scope="session")
def operator_image(cluster_report: Callable[[str], None]) -> BuiltImage:
    """`images/operator`, built once for all tests and again when it changes."""
    if (reason := buildah.why_not()) is not None:
        pytest.skip(reason)
    return buildah.built(buildah.OPERATOR, cluster_report)
