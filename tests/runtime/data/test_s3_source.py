"""Training pictures in a real S3 server."""

from pathlib import Path

import pytest

from atelier_api.run_file import RunFile
from atelier_runtime.store import open_store
from atelier_runtime.store.protocol import sha256_of_file
from s3_server import BUCKET, S3Server
from s3_settings import s3_settings
from tiny_data import all_samples, built, training_run_file

pytest_plugins = ("store_fixtures",)
pytestmark = pytest.mark.processes

URI = f"s3://{BUCKET}/datasets/tiny"


@pytest.fixture
def run(tmp_path: Path, pictures: Path, checkpoint: Path, s3_environment: S3Server) -> RunFile:
    """A run on the four pictures in the bucket; there is nothing else in its folder."""
    settings = s3_settings(s3_environment)
    store = open_store(URI, settings)
    for path in sorted(pictures.iterdir()):
        store.put_file(f"sub/{path.name}", path, sha256_of_file(path))
    run = training_run_file(tmp_path, [], checkpoint, data={"sources": [{"uri": URI}]})
    storage = run.spec.storage.model_copy(update={"s3": settings})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"storage": storage})})


def test_a_prefix_is_trained_on_like_a_folder_and_fetched_only_once(
    run: RunFile, tmp_path: Path, s3_environment: S3Server
) -> None:
    dataset, family = built(run)
    assert sorted(all_samples(dataset)) == [f"sub/{number:03d}.png" for number in range(4)]
    assert (family.pictures, len(family.captions)) == (4, 5)
    fetched = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "downloads").rglob("*.*")}
    assert len(fetched) == 8
    again, family = built(run)
    assert (family.pictures, family.captions, again.hash) == (0, [], dataset.hash)
    assert {path: path.stat().st_mtime_ns for path in fetched} == fetched


def test_a_new_caption_in_the_bucket_is_found_at_the_next_start(run: RunFile) -> None:
    """As long as the one before, and mostly written within the same second: only its ETag differs."""
    built(run)
    open_store(URI, run.spec.storage.s3).put_bytes("sub/002.txt", b"another text")
    _, family = built(run)
    assert (family.pictures, family.captions) == (0, ["another text"])
