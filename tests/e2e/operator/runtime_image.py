"""`make e2e-image`: one run on two nodes with the image of `images/runtime`, which other tests replace by the environment under test.

Not collected by itself: the image has 5 GB, and building it, giving it to two nodes and training take ten minutes and 45 GB of disk.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import buildah
from cluster.buildah import BuiltImage
from cluster.local import Cluster
from cluster_training import (
    SECONDS,
    Place,
    assert_a_lora_of_all_steps,
    default_profile,
    profile_of_image,
)
from go_build import CACHE
from operator_process import OperatorProcess, install_crds
from s3_server import S3Server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]
pytest_plugins = ("cluster_fixtures", "cluster_training")

DISK_BYTES = 45 << 30


@pytest.fixture(scope="module")
def runtime_image(cluster_report: Callable[[str], None]) -> BuiltImage:
    """Built after a look at the disk. Who asks for this test by its name is not told that it was skipped: it fails."""
    if (reason := buildah.why_not()) is not None:
        pytest.fail(reason)
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    if free < DISK_BYTES:
        pytest.fail(
            f"{CACHE} has {free >> 30} GiB free; building the image and two nodes with it need {DISK_BYTES >> 30}"
        )
    return buildah.built(buildah.RUNTIME, cluster_report)


@pytest.fixture(scope="module")
def cluster(
    start_cluster: Callable[..., Cluster], runtime_image: BuiltImage, cluster_report: Callable[[str], None]
) -> Iterator[Cluster]:
    with start_cluster(nodes=2, kueue=False, images_in_memory=False) as cluster:
        cluster_report("giving the image to both nodes")
        cluster.import_image(runtime_image.archive)
        yield cluster


def test_a_run_trains_on_two_nodes_in_the_image_of_the_runtime(
    cluster: Cluster, runtime_image: BuiltImage, store: S3Server, base: Path, tmp_path: Path
) -> None:
    install_crds(cluster)
    cluster.apply(default_profile(profile_of_image(runtime_image.name, {str(base): base})))
    operator = OperatorProcess(cluster, tmp_path / "log", prefix=cluster.inside).start()
    try:
        run = Place.make(cluster, "image", store, base).run()
        run.wait("Succeeded", seconds=2 * SECONDS)
    finally:
        operator.stop()
    pods = run.objects("pods")
    assert {pod["spec"]["nodeName"] for pod in pods} == {"node1", "node2"}
    assert {each["image"] for pod in pods for each in pod["spec"]["containers"]} == {runtime_image.name}
    assert_a_lora_of_all_steps(run, store)
