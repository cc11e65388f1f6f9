"""The base model on its way to this machine: the pod's command against a real HTTP server of a hub, and a real S3 server."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from atelier_api.exit_codes import ExitCode
from atelier_api.log import setup_logging
from atelier_api.model_files import is_whole
from atelier_api.result import AgentResult
from atelier_runtime.fetching.transfer import Meter, Transfer, check_space, run
from atelier_runtime.prefetch import ModelCaches, prefetch
from family_models import save_tiny
from hub_server import TOKEN, Hub, HubRepository, running_hub
from run_files import run_file
from s3_server import BUCKET, S3Server

pytestmark = pytest.mark.processes
pytest_plugins = ["store_fixtures"]

SHARD = "transformer/diffusion_pytorch_model.safetensors"
EXTRAS = ["README.md", "sd3.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "vae/model.onnx"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, with what published repositories hold beside one."""
    folder = save_tiny("sd3", tmp_path_factory.mktemp("checkpoint"))
    for name in EXTRAS:
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories["owner/tiny"] = HubRepository(checkpoint, revisions=("main", "v1"))
        yield hub


@pytest.fixture
def large(hub: Hub, checkpoint: Path, tmp_path: Path) -> Path:
    """A repository whose denoiser is larger than what the library reads at a time, 10 MiB."""
    copy = shutil.copytree(checkpoint, tmp_path / "large")
    (copy / SHARD).write_bytes(secrets.token_bytes(32 << 20))
    hub.repositories["owner/large"] = HubRepository(copy)
    return copy


class Pod:
    """The command with a RunFile whose model belongs at `model`."""

    def __init__(self, folder: Path, source: str, **model: str) -> None:
        self.folder = folder
        self.model = folder / "models" / "base"
        made = run_file(folder, model={"family": "sd3", "source": source, **model})
        made.model_copy(update={"model_folder": str(self.model)}).write(folder / "run.json")
        self.message = folder / "termination-message"

    def start(self, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "atelier_runtime.prefetch", "--run-file", str(self.folder / "run.json")]
        return subprocess.Popen(
            [*command, "--termination-message", str(self.message)],
            env={**os.environ, "HOME": str(self.folder), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def fetch(self, environment: Mapping[str, str], expect: ExitCode = ExitCode.DONE) -> str:
        """Run to the end; gives the message that the kubelet would see."""
        process = self.start(environment)
        _, log = process.communicate(timeout=120)
        assert process.returncode == expect, log[-4000:]
        result = AgentResult.model_validate_json(self.message.read_bytes())
        assert result.exit_code == expect
        assert "Traceback" not in log
        return result.message


def same_files(one: Path, other: Path) -> list[str]:
    """Names in `one`, all of which must be in `other` with the same bytes."""
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return names


def test_what_a_run_reads_is_fetched_once_and_needs_no_hub_afterwards(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    pod = Pod(tmp_path, "hf://owner/tiny")
    assert pod.fetch(hub.environment) == f"the model is in {pod.model}"
    names = same_files(pod.model, checkpoint)
    assert SHARD in names
    assert "model_index.json" in names
    assert not set(names) & set(EXTRAS)
    assert not set(hub.fetched()) & set(EXTRAS)
    assert not os.path.isabs(os.readlink(pod.model))
    hub.requests.clear()
    pod.fetch({**hub.environment, "HF_HUB_OFFLINE": "1"})
    pod.fetch({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert hub.requests == []


def test_the_cache_is_the_one_that_the_hubs_library_reads(hub: Hub, tmp_path: Path) -> None:
    pod = Pod(tmp_path, "hf://owner/tiny@v1")
    pod.fetch({**hub.environment, "HF_HUB_CACHE": str(tmp_path / "cache")})
    found = hf_hub_download("owner/tiny", SHARD, revision="v1", cache_dir=tmp_path / "cache", local_files_only=True)
    assert Path(found).resolve() == (pod.model / SHARD).resolve()


def test_a_killed_download_goes_on_in_the_middle_of_a_file(hub: Hub, large: Path, tmp_path: Path) -> None:
    pod = Pod(tmp_path, "hf://owner/large")
    hub.stalled = threading.Event()
    process = pod.start(hub.environment)
    blobs = tmp_path / "models" / ".cache" / "hub" / "models--owner--large" / "blobs"
    deadline = time.monotonic() + 120
    while not any(part.stat().st_size >= 10 << 20 for part in blobs.glob("*.atelier-part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not pod.model.exists()
    hub.stalled.set()
    hub.stalled = None
    hub.requests.clear()
    pod.fetch(hub.environment)
    same_files(pod.model, large)
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(SHARD)] == [
        f"bytes={10 << 20}-"
    ]
    assert not list(blobs.glob("*.atelier-part"))


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(hub: Hub, large: Path, tmp_path: Path) -> None:
    hub.broken[SHARD] = [25 << 20]
    pod = Pod(tmp_path, "hf://owner/large")
    pod.fetch(hub.environment)
    same_files(pod.model, large)
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(SHARD)] == [
        None,
        f"bytes={20 << 20}-",
    ]


def test_a_stop_is_told_and_what_was_fetched_stays(hub: Hub, tmp_path: Path) -> None:
    pod = Pod(tmp_path, "hf://owner/tiny")
    hub.stalled = threading.Event()
    process = pod.start(hub.environment)
    blobs = tmp_path / "models" / ".cache" / "hub" / "models--owner--tiny" / "blobs"
    deadline = time.monotonic() + 60
    while not list(blobs.glob("*.atelier-part")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == ExitCode.STOPPED
    assert AgentResult.model_validate_json(pod.message.read_bytes()).reason == "Stopped"
    assert list(blobs.iterdir())


def test_bytes_that_are_not_the_hubs_are_never_used(hub: Hub, tmp_path: Path) -> None:
    hub.damaged.add(SHARD)
    pod = Pod(tmp_path, "hf://owner/tiny")
    assert "arrived damaged" in pod.fetch(hub.environment, ExitCode.STORE_UNREACHABLE)
    assert not pod.model.exists()
    hub.damaged.clear()
    pod.fetch(hub.environment)
    assert load_file(pod.model / SHARD)


def test_a_gated_model_is_fetched_with_the_token_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/tiny"].gated = True
    pod = Pod(tmp_path, "hf://owner/tiny")
    for token, said in (({}, "HF_TOKEN is not set"), ({"HF_TOKEN": "hf_of_another"}, "HF_TOKEN has no access")):
        message = pod.fetch({**hub.environment, **token}, ExitCode.CREDENTIALS)
        assert message.startswith("spec.model.source is 'hf://owner/tiny', which is gated: accept the licence on ")
        assert f"{hub.url}/owner/tiny and set HF_TOKEN" in message
        assert said in message
        assert "hf_of_another" not in message
    pod.fetch({**hub.environment, "HF_TOKEN": TOKEN})
    assert is_whole(pod.model)


REFUSED = {
    "no such repository": ({"source": "hf://owner/none"}, {}, ExitCode.CONFIG, "has no such model, or it is private"),
    "no such branch": (
        {"source": "hf://owner/tiny", "revision": "v2"},
        {},
        ExitCode.CONFIG,
        "spec.model.revision names the revision 'v2'; owner/tiny has no such branch, tag or commit",
    ),
    "no such branch in the source": (
        {"source": "hf://owner/tiny@v2"},
        {},
        ExitCode.CONFIG,
        "spec.model.source names the revision 'v2'",
    ),
    "another family": (
        {"source": "hf://owner/tiny", "family": "flux"},
        {},
        ExitCode.CONFIG,
        "spec.model.family is 'flux', which trains checkpoints of FluxPipeline, but hf://owner/tiny is a StableDiffusion3Pipeline",
    ),
    "no network allowed": (
        {"source": "hf://owner/tiny"},
        {"HF_HUB_OFFLINE": "1"},
        ExitCode.CONFIG,
        "HF_HUB_OFFLINE forbids to fetch it; unset it, or run `hf download owner/tiny --revision main`",
    ),
    "no network": (
        {"source": "hf://owner/tiny"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        ExitCode.STORE_UNREACHABLE,
        "cannot reach the hub at http://127.0.0.1:9 for hf://owner/tiny",
    ),
}


@pytest.mark.parametrize(("model", "environment", "code", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fetched_is_one_sentence(
    model: dict[str, str], environment: dict[str, str], code: ExitCode, sentence: str, hub: Hub, tmp_path: Path
) -> None:
    assert sentence in Pod(tmp_path, **model).fetch({**hub.environment, **environment}, code)
    assert not [name for name in hub.fetched() if name != "model_index.json"]


def test_a_checkpoint_without_safetensors_is_refused_before_it_is_fetched(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "pickled")
    (copy / SHARD).rename(copy / "transformer" / "diffusion_pytorch_model.bin")
    hub.repositories["owner/pickled"] = HubRepository(copy)
    message = Pod(tmp_path, "hf://owner/pickled").fetch(hub.environment, ExitCode.CONFIG)
    assert "lacks the weights of transformer as safetensors" in message
    assert hub.fetched() == ["model_index.json"]


def test_a_local_source_is_only_looked_at(checkpoint: Path, tmp_path: Path, hub: Hub) -> None:
    pod = Pod(tmp_path, str(checkpoint))
    assert "is no whole checkpoint" in pod.fetch(hub.environment, ExitCode.CONFIG)
    pod.model.parent.mkdir()
    pod.model.symlink_to(checkpoint)
    pod.fetch(hub.environment)
    assert hub.requests == []


# --- S3 ---------------------------------------------------------------------------------------------------------------


class Told:
    """What a watch is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.shown: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, done: int, total: int) -> None:
        self.shown.append((done, total))


@pytest.fixture
def stored(s3_environment: S3Server, checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The checkpoint as objects of the bucket, put there by a client that knows nothing of us: the server's own folder of files."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3_environment.url, region_name="us-east-1")
    prefix = f"models/{abs(hash(request.node.nodeid))}"
    for path in checkpoint.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(checkpoint).as_posix()}")
    yield s3_environment.folder / prefix
    shutil.rmtree(s3_environment.folder / prefix)


def fetch_stored(server: S3Server, stored: Path, folder: Path) -> tuple[Path, Told]:
    """Fetch the objects into the caches of `folder`."""
    source = f"s3://{BUCKET}/{stored.relative_to(server.folder).as_posix()}/"
    made = run_file(folder, model={"family": "sd3", "source": source}, storage={"s3": {"endpoint": server.url}})
    made = made.model_copy(update={"model_folder": str(folder / "base")})
    told = Told()
    setup_logging()
    return prefetch(made, ModelCaches(folder / "hub", folder / "objects"), told), told


def test_a_prefix_is_fetched_once(s3_environment: S3Server, stored: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder, told = fetch_stored(s3_environment, stored, tmp_path)
    names = same_files(folder.resolve(), checkpoint)
    assert SHARD in names
    assert not set(names) & set(EXTRAS)
    assert told.shown[-1][0] == told.shown[-1][1] == sum((checkpoint / name).stat().st_size for name in names)
    before = folder.resolve().stat()
    again, told = fetch_stored(s3_environment, stored, tmp_path)
    assert told.shown == []
    assert again.resolve().stat() == before


def test_another_content_of_the_prefix_is_another_copy(
    s3_environment: S3Server, stored: Path, checkpoint: Path, tmp_path: Path
) -> None:
    import boto3

    old = fetch_stored(s3_environment, stored, tmp_path)[0].resolve()
    client = boto3.client("s3", endpoint_url=s3_environment.url, region_name="us-east-1")
    key = f"{stored.relative_to(s3_environment.folder).as_posix()}/scheduler/scheduler_config.json"
    client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps({"shift": 1.0}).encode())
    new = fetch_stored(s3_environment, stored, tmp_path)[0].resolve()
    assert new != old
    assert (new / "scheduler/scheduler_config.json").read_text() == '{"shift": 1.0}'
    assert is_whole(old)


def test_an_interrupted_copy_goes_on_with_the_files_that_are_missing(
    s3_environment: S3Server, stored: Path, checkpoint: Path, tmp_path: Path
) -> None:
    whole = fetch_stored(s3_environment, stored, tmp_path)[0].resolve()
    unfinished = whole.with_name(f".{whole.name}.unfinished")
    whole.rename(unfinished)
    (unfinished / SHARD).unlink()
    (unfinished / "transformer" / ".diffusion_pytorch_model.safetensors.arriving").write_bytes(b"half")
    folder, told = fetch_stored(s3_environment, stored, tmp_path)
    same_files(folder.resolve(), checkpoint)
    assert "of them are here" in told.notes[0]
    assert told.shown[0][0] >= told.shown[0][1] - (checkpoint / SHARD).stat().st_size


def test_an_object_that_is_not_what_its_mark_says_is_refused(
    s3_environment: S3Server, stored: Path, checkpoint: Path, tmp_path: Path
) -> None:
    data = bytearray((checkpoint / SHARD).read_bytes())
    data[-1] ^= 1
    with (stored / SHARD).open("r+b") as file:  # as a disk that forgets a bit: size and ETag stay
        file.write(data)
    from atelier_runtime.store import CorruptObject

    with pytest.raises(CorruptObject, match=r"spec\.model\.source is .*safetensors arrived damaged: its MD5 is not"):
        fetch_stored(s3_environment, stored, tmp_path)
    assert not (tmp_path / "base").exists()


def test_a_prefix_without_a_checkpoint_is_refused(s3_environment: S3Server, tmp_path: Path) -> None:
    from atelier_api.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r"spec\.model\.source is 's3://.*': there is no model_index\.json among its 0"
    ):
        fetch_stored(s3_environment, s3_environment.folder / "nothing-here", tmp_path)


# --- transfers --------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    from atelier_api.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r"1e\+06 GB are to be fetched to .*/cache/x, and its disk has .* free; make room, or do"
    ):
        check_space(10**15, tmp_path / "cache" / "x", remedy="do this")


def test_the_first_error_ends_the_other_transfers() -> None:
    ended = threading.Event()

    def endless(meter: Meter) -> None:
        try:
            while True:
                meter.add(1)
                time.sleep(0.01)
        finally:
            ended.set()

    def failing(_meter: Meter) -> None:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        run([Transfer(10**9, 0, endless), Transfer(1, 0, failing)], Told())
    assert ended.is_set()
