"""Whole runs whose base model lies elsewhere: on a hub, and below an S3 prefix. The first keeps its results in S3 as well."""

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from atelier_cli.machine import surroundings
from atelier_cli.outcome import loading
from atelier_cli.prefetching import ensure_model
from atelier_cli.run_source import load
from hub_server import Hub, HubRepository, running_hub
from runs import LocalRun, tiny_run
from s3_server import BUCKET, S3Server

pytestmark = pytest.mark.processes
pytest_plugins = ["store_fixtures"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def run_elsewhere(folder: Path, name: str, source: str, **spec: object) -> tuple[LocalRun, Path]:
    """A short run of a source that is not on this machine, and the checkpoint that is to be found there."""
    folder.mkdir()
    here = tiny_run(folder, name=name, parallelism={"processesPerNode": 1})
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    (folder / "base").rename(elsewhere)
    return here.changed(model={"source": source}, hyperparameters={"steps": 2, "globalBatchSize": 2}, **spec), elsewhere


def test_a_run_trains_a_model_of_the_hub_and_goes_on_without_it(
    hub: Hub,
    s3_tls_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3 = {"endpoint": s3_tls_server.url, "caBundle": s3_tls_server.ca_bundle}
    storage = {"uri": f"s3://{BUCKET}/runs", "s3": s3}
    run, elsewhere = run_elsewhere(tmp_path / "run", "from-hub", "hf://owner/tiny", storage=storage)
    hub.repositories["owner/tiny"] = HubRepository(elsewhere)
    environment = {**hub.environment, **s3_tls_server.environment, "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "objects")
    output = run.train(environment=environment)
    assert "fetching hf://owner/tiny at " in output
    assert 'DiffusionPipeline.from_pretrained("owner/tiny")' in output
    assert f"weights  s3://{BUCKET}/runs/default/from-hub-local/exports/diffusers/" in output
    stored = s3_tls_server.folder / "runs/default/from-hub-local"
    assert (stored / "exports/diffusers/pytorch_lora_weights.safetensors").exists()
    for name, value in {**environment, "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    asked = len(hub.requests)
    longer = run.changed(hyperparameters={"steps": 3})
    capsys.readouterr()
    ensure_model(load(longer.path).spec, surroundings(longer.path), quiet=False)
    assert capsys.readouterr() == ("", "")
    longer.train_in_forks()
    assert len(hub.requests) == asked


def test_a_run_trains_a_model_of_a_bucket_through_the_connection_of_its_store(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = run_elsewhere(
        tmp_path / "run", "from-bucket", f"s3://{BUCKET}/models/tiny", storage={"s3": {"endpoint": s3_server.url}}
    )
    keys = {"aws_access_key_id": s3_server.environment["AWS_ACCESS_KEY_ID"]}
    keys["aws_secret_access_key"] = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
    client = boto3.client("s3", endpoint_url=s3_server.url, region_name="us-east-1", **keys)
    for path in elsewhere.rglob("*"):
        if path.is_file():
            client.upload_file(os.fspath(path), BUCKET, f"models/tiny/{path.relative_to(elsewhere).as_posix()}")
    for name, value in {**s3_server.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    ensure_model(load(run.path).spec, surroundings(run.path), quiet=False)
    assert f"fetching s3://{BUCKET}/models/tiny: " in capsys.readouterr().out
    run.train_in_forks()
    assert (run.folder / "exports/diffusers/pytorch_lora_weights.safetensors").exists()
    copies = [path for path in (tmp_path / "cache/atelier/models").glob("*/*") if path.is_dir()]
    assert len(copies) == 1
    lines = loading(run.resolved(), ["exports/diffusers/pytorch_lora_weights.safetensors"])
    assert f'pipe = DiffusionPipeline.from_pretrained("{copies[0]}")' in lines


def test_a_gated_model_ends_the_command_with_one_sentence(hub: Hub, tmp_path: Path) -> None:
    run, elsewhere = run_elsewhere(tmp_path / "run", "gated", "hf://owner/tiny")
    hub.repositories["owner/tiny"] = HubRepository(elsewhere, gated=True)
    output = run.train(expect=77, environment={**hub.environment, "HF_HUB_CACHE": str(tmp_path / "cache")})
    assert output.count("\n") == 1
    assert "accept the licence on" in output
