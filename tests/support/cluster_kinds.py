"""The kinds of clusters on which a run must live: with all engines, without Kueue, without JobSet and Kueue.

A module takes `pytest_plugins = ("cluster_fixtures", "cluster_kinds")` and, in its `pytestmark`, `as_the_chart_allows`. It runs on the
full kind, unless it or each of its tests says `on(...)`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from chart_release import IMAGE, Rights, chart_operator, install_chart
from cluster.api import place
from cluster.local import Cluster
from cluster_documents import queues, resource_quota, run_document
from cluster_fixtures import KeptClusters
from operator_process import ClusterRun, OperatorProcess, checked, forget_namespace, until

Make = Callable[..., ClusterRun]
Values = dict[str, Any]


@dataclass(frozen=True)
class Engines:
    """What a cluster has besides Kubernetes, and what an attempt is made of there."""

    jobset: bool
    kueue: bool

    @property
    def backend(self) -> str:
        return "jobset" if self.jobset else "job"

    @property
    def child(self) -> str:
        """The kind of an attempt's child, as the API's paths name it."""
        return "jobsets" if self.jobset else "jobs"


FULL = Engines(jobset=True, kueue=True)
NO_KUEUE = Engines(jobset=True, kueue=False)
NEITHER = Engines(jobset=False, kueue=False)
NAMES = {NO_KUEUE: "without Kueue", NEITHER: "without JobSet and Kueue", FULL: "full"}
as_the_chart_allows = pytest.mark.usefixtures("rights")
"""Not autouse: the fixtures of a plugin are those of every test of the session."""


def on(*kinds: Engines) -> pytest.MarkDecorator:
    """The kinds of cluster that a test runs on: the same for all of its module, or else the full one last, which stays to the end."""
    return pytest.mark.parametrize("engines", kinds, ids=NAMES.get, indirect=True, scope="module")


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest) -> Engines:
    kind: Engines = getattr(request, "param", FULL)
    return kind


@pytest.fixture(scope="module")
def kind_cluster(engines: Engines, request: pytest.FixtureRequest, kept_clusters: KeptClusters) -> Cluster:
    """The module's full cluster, or the one of the kind."""
    if engines == FULL:
        full: Cluster = request.getfixturevalue("fake_cluster")
        return full
    return kept_clusters.get((engines.jobset, engines.kueue))


@pytest.fixture(scope="module")
def api_url(kind_cluster: Cluster) -> str:
    """Where the operator finds the API server; a module that puts a relay between has a fixture of its own."""
    return kind_cluster.certificates.api_url


@pytest.fixture(scope="module")
def operator_values() -> Values:
    """The chart's values of the operator; a module that has others has a fixture of its own."""
    return {}


@pytest.fixture(scope="module")
def operator(
    kind_cluster: Cluster, api_url: str, operator_values: Values, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """The chart is installed, its operator runs."""
    install_chart(kind_cluster, {"operator": IMAGE | operator_values})
    with checked(kind_cluster):
        process = chart_operator(kind_cluster, tmp_path_factory.mktemp("operator") / "log", api_url).start()
        yield process
        process.stop()


@contextmanager
def making(cluster: Cluster, namespace: str) -> Iterator[Make]:
    """Makes runs in a new namespace."""
    cluster.make_namespace(namespace)

    def run(name: str = "run", *, queued: int | None = None, quota: int | None = None, **spec: Any) -> ClusterRun:
        """`queued`: GPUs of a Kueue queue that is made before; `quota`: GPUs of a ResourceQuota."""
        if queued is not None:
            cluster.apply(queues(namespace, queued))
        if quota is not None:
            cluster.apply(resource_quota(namespace, quota))
            where = place("resourcequotas", namespace, "gpus")
            until(lambda: "used" in ((cluster.api.get(where) or {}).get("status") or {}), "the quota to be counted")
        cluster.apply(json.dumps(run_document(namespace, name, **spec)))
        return ClusterRun(cluster, namespace, name)

    yield run
    forget_namespace(cluster, namespace)


@pytest.fixture
def make(operator: OperatorProcess, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes runs in the test's own namespace."""
    with making(operator.cluster, f"t{abs(hash(request.node.nodeid)) % 10**8}") as run:
        yield run


@pytest.fixture(scope="module")
def audited(operator: OperatorProcess) -> Rights:
    return Rights(operator.cluster)


@pytest.fixture
def rights(audited: Rights) -> Iterator[Rights]:
    """After each test: no call of the operator was denied."""
    yield audited
    audited.check()
