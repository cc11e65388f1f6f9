"""Which worker runs what: one has the tests of clusters, which mostly wait; the others compute in the meantime.

A test of a cluster leaves half of a core idle, so there is one worker more than there are cores. The worker of the clusters comes
first where all want to compute: its tests have leases and grace periods, the others' have none. A worker that has nothing left of
its own kind helps with the other.
"""

import os

import pytest
from xdist.scheduler.loadfile import LoadFileScheduling
from xdist.workermanage import WorkerController

WAITING = ("tests/e2e/operator/", "tests/e2e/cluster/", "tests/helm/test_install.py")
WAITS = "gw0"
_NICE = 5


class WaitingBesideComputing(LoadFileScheduling):
    """Hands out files, in the order in which they were collected, to the worker that they are for."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        own = (file for file in self.workqueue if file.startswith(WAITING) == (node.gateway.id == WAITS))
        if (file := next(own, None)) is not None:
            self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that share kept clusters (tests/support/cluster_fixtures.py) come after each other, those with several kinds last."""
    kept = {each.path for each in items if "kept_clusters" in getattr(each, "fixturenames", ())}
    several = {each.path for each in items if "engines" in getattr(getattr(each, "callspec", None), "params", ())}
    items.sort(key=lambda item: (item.path not in kept, item.path in kept & several))


def pytest_configure() -> None:
    if os.environ.get("PYTEST_XDIST_WORKER", WAITS) != WAITS:
        os.nice(_NICE)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling | None:
    """Only where files are handed out whole: other ways of handing out are xdist's own."""
    return WaitingBesideComputing(config, log) if config.getoption("dist") == "loadfile" else None
