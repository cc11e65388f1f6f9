"""A run on this machine: places, hardware, credentials, and the whole way to the RunFile."""

from pathlib import Path
from typing import Any

import pytest

from atelier_api.errors import ConfigError, CredentialsError
from atelier_api.model_files import objects_folder
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import Machine
from atelier_operator.planner.local import (
    Host,
    Surroundings,
    check_flavour_fits,
    check_places,
    check_s3_credentials,
    local_facts,
    local_machine,
    model_folder,
    resolve_local,
)
from header_checkpoints import SD3_INDEX, write_checkpoint
from planned_runs import cpu, run

GIB = 1 << 30
ON_CPU = {"gpusPerNode": 0}


def around(folder: Path, **environment: str) -> Surroundings:
    """Surroundings of a run's folder, with a home and a machine of no vendor beside it."""
    return Surroundings(folder=folder, home=folder / "home", environment=environment, machine_vendor=folder / "vendor")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a checkpoint and pictures."""
    write_checkpoint(tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    return tmp_path


def local(**changes: Any) -> TrainingRun:
    return run("sd3", parallelism=ON_CPU, data__resolution=64, **changes)


def test_a_run_beside_its_model_and_pictures_gets_absolute_places(place: Path) -> None:
    file = resolve_local(local(), machine=cpu(8), around=around(place))
    assert file.model_folder == str(place / "base")
    assert [source.uri for source in file.spec.data.sources] == [str(place / "pictures")]
    assert file.store_uri == str(place / "runs" / "default" / "small-local")
    assert file.scratch == str(place / "runs" / ".scratch" / "default-small")
    assert file.cache_uri == str(place / "runs" / ".cache")
    assert file.identity.uid == "local"
    assert file.plan.strategy == "single"
    assert file.plan.device_memory_bytes == 8 * GIB


def test_the_model_is_measured_by_its_own_files_not_by_the_table(place: Path) -> None:
    file = resolve_local(local(), machine=cpu(8), around=around(place))
    assert file.plan.predicted_peak_memory_bytes < 2 * GIB
    assert local_facts(local().spec, around(place)).origin == f"the checkpoint in {place / 'base'}"


def test_absolute_paths_parents_and_the_home_are_followed(place: Path) -> None:
    here = around(place / "runs-of-today")
    assert here.absolute("../base") == place / "base"
    assert here.absolute(str(place / "base")) == place / "base"
    assert here.absolute("~/x") == here.home / "x"


def test_a_remote_store_keeps_cache_and_scratch_in_the_users_cache(place: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    file = resolve_local(local(storage__uri="s3://runs/art/"), machine=cpu(8), around=around(place, **keys))
    assert file.spec.storage.uri == "s3://runs/art/"
    assert file.store_uri == "s3://runs/art/default/small-local"
    assert file.scratch == str(place / "home/.cache/atelier/.scratch/default-small")
    assert file.cache_uri == str(place / "home/.cache/atelier/.cache")


def test_the_file_of_certificate_authorities_is_made_absolute(place: Path) -> None:
    (place / "ca.pem").write_text("x")
    file = resolve_local(local(storage__s3__caBundle="ca.pem"), machine=cpu(8), around=around(place))
    assert file.spec.storage.s3.ca_bundle == str(place / "ca.pem")


def shown(*prompts: dict[str, str]) -> TrainingRun:
    """A run whose validation prompts show pictures."""
    return run("wan", parallelism=ON_CPU, data__resolution=64, data__clip__frames=5, validation__prompts=list(prompts))


def test_pictures_of_prompts_are_made_absolute(place: Path) -> None:
    write_checkpoint(place / "base", SD3_INDEX | {"_class_name": "WanImageToVideoPipeline"})
    (place / "first.png").write_text("x")
    prompts = {"text": "a", "image": "first.png", "lastImage": "s3://bucket/last.png"}, {"text": "b"}
    uses = around(place, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    file = resolve_local(shown(*prompts), machine=cpu(8), around=uses)
    places = [(prompt.image, prompt.last_image) for prompt in file.spec.validation.prompts]
    assert places == [(str(place / "first.png"), "s3://bucket/last.png"), (None, None)]


def test_a_picture_that_is_not_there_is_told(place: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_local(shown({"text": "a", "image": "first.png"}), machine=cpu(8), around=around(place))
    path = "spec.validation.prompts[0].image"
    assert str(refused.value) == f"{path} is 'first.png'; there is no file {place / 'first.png'}"


def test_conditioning_pictures_get_absolute_places(place: Path) -> None:
    prompts = [{"text": "a", "conditioning": "edges/a.png", "conditioningScale": "1"}]
    sources = [{"uri": "pictures", "conditioning": "edges"}]
    changes = {"data__sources": sources, "validation": {"prompts": prompts}}
    controlled = local(adapter={"type": "controlnet"}, **changes)
    with pytest.raises(ConfigError) as refused:
        check_places(controlled.spec, around(place))
    assert str(refused.value).splitlines() == [
        f"spec.data.sources[0].conditioning is 'edges'; there is no folder {place / 'edges'}",
        f"spec.validation.prompts[0].conditioning is 'edges/a.png'; there is no file {place / 'edges/a.png'}",
    ]
    (place / "edges").mkdir()
    (place / "edges" / "a.png").write_text("x")
    file = resolve_local(controlled, machine=cpu(64), around=around(place))
    assert [source.conditioning for source in file.spec.data.sources] == [str(place / "edges")]
    assert [prompt.conditioning for prompt in file.spec.validation.prompts] == [str(place / "edges/a.png")]
    assert file.plan.learning_rate == 1e-5


def test_everything_that_is_not_there_is_told_at_once(place: Path) -> None:
    absent = local(
        model__source="nowhere",
        data__sources=[{"uri": "pictures"}, {"uri": "more"}],
        storage__s3__caBundle="ca.pem",
    )
    with pytest.raises(ConfigError) as refused:
        resolve_local(absent, machine=cpu(8), around=around(place))
    assert str(refused.value).splitlines() == [
        f"spec.model.source is 'nowhere'; there is no folder {place / 'nowhere'}",
        f"spec.data.sources[1].uri is 'more'; there is no folder {place / 'more'}",
        f"spec.storage.s3.caBundle is 'ca.pem'; there is no file {place / 'ca.pem'}",
    ]


def test_reference_pictures_get_absolute_places(place: Path) -> None:
    prompts = [{"text": "make it red", "references": ["a.png"]}, {"text": "blue", "references": ["s3://data/b.png"]}]
    sources = [{"uri": "pictures", "references": ["originals"]}, {"uri": "more", "references": ["s3://data/originals"]}]
    pairs = run("flux_kontext", parallelism=ON_CPU, data__sources=sources, validation={"prompts": prompts})
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with pytest.raises(ConfigError) as refused:
        check_places(pairs.spec, around(place, **keys))
    assert str(refused.value).splitlines() == [
        f"spec.data.sources[1].uri is 'more'; there is no folder {place / 'more'}",
        f"spec.data.sources[0].references[0] is 'originals'; there is no folder {place / 'originals'}",
        f"spec.validation.prompts[0].references[0] is 'a.png'; there is no file {place / 'a.png'}",
    ]
    for name in ("more", "originals"):
        (place / name).mkdir()
    (place / "a.png").write_text("x")
    with pytest.raises(CredentialsError, match=r"sources\[1\]\.references\[0\] is 's3://data/originals'"):
        check_places(pairs.spec, around(place))
    check_places(pairs.spec, around(place, **keys))
    write_checkpoint(place / "base", SD3_INDEX | {"_class_name": "FluxKontextPipeline"})
    file = resolve_local(pairs, machine=cpu(64), around=around(place, **keys))
    assert [source.references for source in file.spec.data.sources] == [
        [str(place / "originals")],
        ["s3://data/originals"],
    ]
    assert [prompt.references for prompt in file.spec.validation.prompts] == [
        [str(place / "a.png")],
        ["s3://data/b.png"],
    ]


def test_a_run_that_does_not_fit_is_refused_before_anything_starts(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"the checkpoint in .* does not fit: needs .* a process has"):
        resolve_local(local(), machine=Machine("cpu", 0, GIB // 2, 2), around=around(place))


# --- hub --------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def whole_checkpoint(folder: Path) -> Path:
    """A checkpoint with the configuration of every component."""
    write_checkpoint(folder)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        (folder / name / "config.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(place: Path) -> Path:
    """The hub's cache with one snapshot of a checkpoint."""
    cache = place / "home/.cache/huggingface/hub/models--owner--name"
    whole_checkpoint(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    return cache / "snapshots" / COMMIT


@pytest.mark.parametrize("source", ["hf://owner/name", "hf://owner/name@main", f"hf://owner/name@{COMMIT}"])
def test_a_hub_source_is_its_snapshot_in_the_cache(source: str, hub: Path, place: Path) -> None:
    file = resolve_local(local(model__source=source), machine=cpu(8), around=around(place))
    assert file.model_folder == str(hub)


def test_the_revision_of_the_spec_picks_the_snapshot(hub: Path, place: Path) -> None:
    pinned = local(model__source="hf://owner/name", model__revision=COMMIT)
    assert model_folder(pinned.spec, around(place)) == hub
    other = local(model__source="hf://owner/name", model__revision="v2")
    assert model_folder(other.spec, around(place)) is None


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/cache"}, "/cache"),
    ],
)
def test_the_hubs_cache_is_where_its_library_has_it(environment: dict[str, str], cache: str, tmp_path: Path) -> None:
    assert around(tmp_path, **environment).hub_cache == tmp_path / cache


def test_a_model_that_is_not_fetched_has_no_run_file(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"spec\.model\.source is 'hf://owner/name', which is not on"):
        resolve_local(local(model__source="hf://owner/name"), machine=cpu(8), around=around(place))


def test_a_model_that_is_not_fetched_is_no_mistake_of_the_places(place: Path) -> None:
    check_places(local(model__source="hf://owner/name").spec, around(place))
    with pytest.raises(ConfigError, match="there is no folder"):
        check_places(local(model__source="nowhere").spec, around(place))


def test_a_model_that_is_not_fetched_is_planned_with_the_table(place: Path) -> None:
    spec = local(model__source="hf://owner/name", model__flavour="3.5-large").spec
    assert local_facts(spec, around(place)).origin == "sd3 3.5-large"


def test_a_flavour_that_does_not_fit_is_refused_before_it_is_fetched(hub: Path, place: Path) -> None:
    large = local(model__source="hf://owner/other", model__flavour="3.5-large")
    with pytest.raises(ConfigError, match=r"sd3 3\.5-large does not fit"):
        check_flavour_fits(large, machine=cpu(8), around=around(place))
    check_flavour_fits(local(model__source="hf://owner/other"), machine=cpu(8), around=around(place))
    here = local(model__source="hf://owner/name", model__flavour="3.5-large")
    check_flavour_fits(here, machine=cpu(8), around=around(place))


def test_a_snapshot_that_is_half_fetched_is_planned_with_the_table(hub: Path, place: Path) -> None:
    (hub / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    spec = local(model__source="hf://owner/name").spec
    assert local_facts(spec, around(place)).origin == "sd3 3.5-medium"


def test_a_model_of_a_bucket_is_its_newest_copy(place: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    here = around(place, **keys)
    remote = local(model__source="s3://models/sd3/")
    assert model_folder(remote.spec, here) is None
    copies = objects_folder(here.model_cache, "s3://models/sd3", remote.spec.storage.s3)
    whole_checkpoint(copies / "0123")
    (copies / "current").write_text("0123")
    assert resolve_local(remote, machine=cpu(8), around=here).model_folder == str(copies / "0123")
    other = local(model__source="s3://models/sd3/", storage__s3__endpoint="http://127.0.0.1:9000")
    assert model_folder(other.spec, here) is None, "the same prefix of another store"


# --- hardware ---------------------------------------------------------------------------------------------------------

TWO = Host(cores=8, memory_bytes=64 * GIB, gpu_memory_bytes=(80 * GIB, 24 * GIB))
NONE = Host(cores=8, memory_bytes=64 * GIB)


def machine(host: Host, **parallelism: int) -> Machine:
    processes = parallelism.get("nodes", 1) * max(parallelism.get("gpusPerNode", 1), 1)
    spec = run(parallelism=parallelism, hyperparameters__globalBatchSize=processes).spec
    return local_machine(spec, host)


def test_the_smallest_gpu_of_those_used_is_what_fits() -> None:
    assert machine(TWO) == Machine("cuda", 1, 80 * GIB, 8)
    assert machine(TWO, gpusPerNode=2) == Machine("cuda", 2, 24 * GIB, 8)


def test_a_gpu_of_unknown_memory_makes_the_memory_unknown() -> None:
    assert machine(Host(8, None, (80 * GIB, None)), gpusPerNode=2).memory_bytes is None


def test_nodes_on_one_machine_share_it() -> None:
    assert machine(NONE, nodes=2, gpusPerNode=0) == Machine("cpu", 0, 32 * GIB, 4)
    assert machine(Host(1, None), nodes=2, gpusPerNode=0) == Machine("cpu", 0, None, 1)
    assert machine(TWO, nodes=2, gpusPerNode=1) == Machine("cuda", 1, 24 * GIB, 4)


@pytest.mark.parametrize(
    ("said", "threads"), [("3", 3), ("2,1", 2), ("16", 8), ("", 8), ("0", 8), ("many", 8)], ids=str
)
def test_a_process_has_no_more_threads_than_the_environment_allows(said: str, threads: int, place: Path) -> None:
    file = resolve_local(local(), machine=cpu(8), around=around(place, OMP_NUM_THREADS=said))
    assert file.plan.threads_per_process == threads


@pytest.mark.parametrize(
    ("host", "parallelism", "sentence"),
    [
        (NONE, {}, "spec.parallelism.gpusPerNode is 1; this machine has no GPUs; 0 trains on the CPU"),
        (TWO, {"gpusPerNode": 4}, "spec.parallelism.gpusPerNode is 4; this machine has 2 GPUs; 0 trains on the CPU"),
        (
            Host(8, None, (80 * GIB,)),
            {"nodes": 2},
            "spec.parallelism.gpusPerNode is 1 for each of 2 nodes; this machine has 1 GPU; 0 trains on the CPU",
        ),
    ],
)
def test_gpus_that_are_not_there_are_refused(host: Host, parallelism: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        machine(host, **parallelism)
    assert str(refused.value) == sentence


# --- credentials ------------------------------------------------------------------------------------------------------

CREDENTIALS: dict[str, dict[str, str]] = {
    "keys": {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    "a profile": {"AWS_PROFILE": "art"},
    "a web identity": {"AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn"},
    "a container's role": {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2"},
    "a pod's identity": {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1"},
}


@pytest.mark.parametrize("environment", CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_in_the_environment_are_found(environment: dict[str, str], tmp_path: Path) -> None:
    check_s3_credentials(local(storage__uri="s3://runs").spec, around(tmp_path, **environment))


@pytest.mark.parametrize("name", ["credentials", "config"])
def test_credentials_in_the_home_folder_are_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    (tmp_path / "home" / ".aws" / name).write_text("[default]\n")
    check_s3_credentials(local(storage__uri="s3://runs").spec, around(tmp_path))


def test_credentials_in_a_file_that_the_environment_names_are_found(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("[default]\n")
    check_s3_credentials(
        local(storage__uri="s3://runs").spec, around(tmp_path, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "keys"))
    )


def test_a_machine_of_ec2_may_have_a_role(tmp_path: Path) -> None:
    (tmp_path / "vendor").write_text("Amazon EC2\n")
    check_s3_credentials(local(storage__uri="s3://runs").spec, around(tmp_path))


WITHOUT: dict[str, dict[str, str]] = {
    "nothing": {},
    "half a pair of keys": {"AWS_ACCESS_KEY_ID": "a"},
    "empty keys": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
    "half a web identity": {"AWS_ROLE_ARN": "arn"},
    "a file that is not there": {"AWS_CONFIG_FILE": "/nowhere"},
}


@pytest.mark.parametrize("environment", WITHOUT.values(), ids=WITHOUT)
def test_a_run_on_s3_without_credentials_is_refused_with_the_ways_to_give_them(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CredentialsError) as refused:
        check_s3_credentials(local(storage__uri="s3://runs/art").spec, around(tmp_path, **environment))
    assert str(refused.value) == (
        "spec.storage.uri is 's3://runs/art', and there are no credentials for S3; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or write ~/.aws/credentials"
    )


def test_a_source_on_s3_needs_credentials_too(tmp_path: Path) -> None:
    remote = local(data__sources=[{"uri": "pictures"}, {"uri": "s3://data"}])
    with pytest.raises(CredentialsError, match=r"spec\.data\.sources\[1\]\.uri is 's3://data'"):
        check_s3_credentials(remote.spec, around(tmp_path))


def test_a_model_on_s3_needs_credentials_too(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match=r"spec\.model\.source is 's3://models/sd3'"):
        check_s3_credentials(local(model__source="s3://models/sd3").spec, around(tmp_path))


def test_a_run_on_the_disk_needs_no_credentials(tmp_path: Path) -> None:
    check_s3_credentials(local().spec, around(tmp_path))
