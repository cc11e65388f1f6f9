"""The endpoint of a node."""

import json
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from atelier_api.progress import Progress
from atelier_runtime.observe.exposition import Endpoint
from atelier_runtime.observe.progress import write_progress


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    served = Endpoint(0, metrics=tmp_path / "metrics", labels={"run": "demo"}, progress=tmp_path / "progress.json")
    yield served
    served.close()


def _get(endpoint: Endpoint, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_progress_is_served_before_there_is_any(endpoint: Endpoint) -> None:
    assert Progress.model_validate_json(_get(endpoint, "/progress")) == Progress()


def test_progress_is_the_newest_message(endpoint: Endpoint, tmp_path: Path) -> None:
    write_progress(tmp_path / "progress.json", Progress(stage="Training", total_steps=9))
    assert json.loads(_get(endpoint, "/progress?x=1"))["totalSteps"] == 9


def test_metrics_of_a_node_without_ranks_are_its_own(endpoint: Endpoint) -> None:
    text = _get(endpoint, "/metrics")
    assert 'atelier_staging_free_bytes{run="demo"}' in text
    assert "atelier_train" not in text


def test_health_is_a_plain_word(endpoint: Endpoint) -> None:
    assert _get(endpoint, "/healthz") == "ok\n"


def test_an_unknown_path_names_the_known_ones(endpoint: Endpoint) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _get(endpoint, "/")
    assert caught.value.code == 404
    assert "/metrics" in caught.value.read().decode()


def test_a_damaged_file_of_numbers_is_an_error_of_the_scrape_only(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "counter_1.db").write_bytes(struct.pack("ii", 64, 0) + b"\x01" * 64)
    with pytest.raises(urllib.error.HTTPError) as caught:
        _get(endpoint, "/metrics")
    assert caught.value.code == 500
    assert _get(endpoint, "/healthz") == "ok\n"
