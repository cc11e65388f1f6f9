"""Whole runs whose store is a real S3 server, in plain HTTP and over TLS with a private authority. Ranks are forks (see `runs`).

By the command that users type, a run with such a store is trained in test_model_sources.py.
"""

from pathlib import Path

import pytest

from runs import LocalRun, tiny_run, write_digits
from s3_server import BUCKET, S3Server

pytestmark = pytest.mark.processes
pytest_plugins = ["store_fixtures"]


def stored(server: S3Server, pattern: str) -> list[Path]:
    return sorted((server.folder / "runs" / "default").glob(pattern))


def s3_run(folder: Path, server: S3Server, name: str, processes: int) -> LocalRun:
    s3 = {"endpoint": server.url} | ({"caBundle": server.ca_bundle} if server.ca_bundle else {})
    return tiny_run(
        folder,
        name=name,
        hyperparameters={"steps": 4},
        parallelism={"processesPerNode": processes},
        storage={"uri": f"s3://{BUCKET}/runs", "s3": s3},
        validation={"prompts": [{"text": "a handwritten three"}], "steps": 2},
    )


@pytest.mark.parametrize("scheme", ["http", "tls"])
def test_a_run_in_s3_leaves_everything_there_and_resumes_from_it(
    scheme: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: S3Server = request.getfixturevalue("s3_server" if scheme == "http" else "s3_tls_server")
    for name, value in {**server.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    run = s3_run(tmp_path, server, f"in-{scheme}", processes=1 if scheme == "http" else 2)
    run.train_in_forks()
    root = f"in-{scheme}-local"
    assert [path.name[:8] for path in stored(server, f"{root}/manifests/*.json")][-1] == "00000004"
    assert stored(server, f"{root}/exports/diffusers/pytorch_lora_weights.safetensors")
    assert stored(server, f"{root}/samples/00000004/0.png")
    assert stored(server, f"{root}/report.html")
    [untrained] = stored(server, f"{root}/samples/00000000/0.png")
    drawn_at = untrained.stat().st_mtime_ns
    run.changed(hyperparameters={"steps": 6}).train_in_forks()
    assert [path.name[:8] for path in stored(server, f"{root}/manifests/*.json")][-1] == "00000006"
    assert untrained.stat().st_mtime_ns == drawn_at, "the second run did not go on from step 4"


def test_wrong_credentials_end_the_run_with_one_sentence(tmp_path: Path, s3_server: S3Server) -> None:
    write_digits(tmp_path / "pictures", 4)
    run = s3_run(tmp_path, s3_server, "refused", processes=1)
    wrong = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    output = run.train(expect=77, environment=wrong)
    assert "Traceback" not in output
    assert "credentials" in output.lower() or "signature" in output.lower()
