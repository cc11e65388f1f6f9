"""Fixtures of real clusters. A test module takes them with `pytest_plugins = ("cluster_fixtures",)` and sets a long timeout,
because the first one on a machine builds Kubernetes (`make cluster` does that beforehand).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

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


# Not of the whole test run: three idle clusters take an eighth of two cores from the tests that follow, and one starts in seconds.


@pytest.fixture(scope="module")
def fake_cluster(start_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    """A control plane with JobSet, Kueue and four fake nodes of eight GPUs; the module's, so a test uses a namespace of its own."""
    with start_cluster(kwok=FAKE_NODES, gpus_per_node=FAKE_GPUS) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def operator_image(cluster_report: Callable[[str], None]) -> BuiltImage:
    """`images/operator`, built once for all tests and again when it changes."""
    if (reason := buildah.why_not()) is not None:
        pytest.skip(reason)
    return buildah.built(buildah.OPERATOR, cluster_report)
