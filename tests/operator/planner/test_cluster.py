"""A run on a cluster: its machine by the profile, its paths in the pods, and what the profile does not allow."""

from typing import Any

import pytest

from atelier_api.errors import ConfigError
from atelier_api.read import problems
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import Machine
from atelier_operator.planner.cluster import (
    DoesNotFit,
    cluster_machine,
    cluster_run_file,
    gpu_class,
    network,
    not_permitted,
    with_profile,
)
from run_stories import profile, raw_run


def run(**spec: Any) -> TrainingRun:
    raw = raw_run(**spec)
    raw["metadata"] = {"name": "knight", "namespace": "art"}
    assert problems(raw) == []
    return TrainingRun.model_validate(raw)


MACHINES = {
    "the profile's first GPU": ({}, {}, Machine("cuda", 1, 80 << 30, 0)),
    "a named GPU": ({"gpuClass": "l4-24g", "gpusPerNode": 4}, {}, Machine("cuda", 4, 24 << 30, 0)),
    "CPUs": ({"gpusPerNode": 0}, {"resources": {"cpu": "8"}}, Machine("cpu", 0, None, 8)),
    "half a CPU": ({"gpusPerNode": 0}, {"resources": {"cpu": "500m"}}, Machine("cpu", 0, None, 1)),
    "CPUs without GPUs in the profile": ({"gpusPerNode": 0}, {"gpuClasses": []}, Machine("cpu", 0, None, 1)),
}


@pytest.mark.parametrize(("parallelism", "changes", "expected"), MACHINES.values(), ids=MACHINES)
def test_the_machine_is_one_pod(parallelism: dict[str, Any], changes: dict[str, Any], expected: Machine) -> None:
    assert cluster_machine(run(parallelism=parallelism).spec, profile(**changes)) == expected


def test_there_is_no_gpu_class_on_the_cpu_and_no_network_unless_one_is_named() -> None:
    spec = run(parallelism={"gpusPerNode": 0}).spec
    assert gpu_class(spec, profile()) is None
    assert network(spec, profile()) is None
    named = network(run(parallelism={"network": "infiniband"}).spec, profile())
    assert named is not None
    assert named.environment[0].name == "NCCL_IB_HCA"


def test_a_network_of_a_profile_without_any_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spec.parallelism.network is 'roce'.*it has none"):
        network(run(parallelism={"network": "roce"}).spec, profile(networks=[]))


STORE = {
    "uri": "s3://shared/runs",
    "s3": {"endpoint": "https://store.example"},
    "credentialsRef": {"name": "shared"},
}


def test_a_run_without_a_store_gets_the_profiles() -> None:
    storage = with_profile(run(storage={"uri": "runs"}), profile(storage=STORE)).spec.storage
    assert (storage.uri, storage.s3.endpoint) == ("s3://shared/runs", "https://store.example")
    assert storage.credentials_ref is not None
    assert storage.credentials_ref.name == "shared"


def test_a_run_without_a_store_keeps_its_own_credentials() -> None:
    of = run(storage={"uri": "runs", "credentialsRef": {"name": "mine"}})
    storage = with_profile(of, profile(storage=STORE)).spec.storage
    assert storage.credentials_ref is not None
    assert storage.credentials_ref.name == "mine"


def test_a_run_that_names_a_store_keeps_it() -> None:
    of = run()
    assert with_profile(of, profile(storage=STORE)) is of
    assert with_profile(run(storage={"uri": "runs"}), profile()).spec.storage.uri == "runs"


ALLOWED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "no limits": ({}, {}, []),
    "at the limits": ({}, {"limits": {"nodes": 2, "gpus": 2}}, []),
    "too many nodes and GPUs": (
        {"parallelism": {"nodes": 4, "gpusPerNode": 2}},
        {"limits": {"nodes": 2, "gpus": 4}},
        ["spec.parallelism.nodes is 4; the profile allows at most 2", "spec.parallelism asks for 8 GPUs"],
    ),
    "no GPUs allowed": ({}, {"limits": {"gpus": 0}}, ["at most 0"]),
    "an allowed model": ({"model": {"source": "hf://lab/model"}}, {"allowedModels": ["s3://", "hf://lab/"]}, []),
    "another model": (
        {"model": {"source": "hf://labs/model"}},
        {"allowedModels": ["s3://", "hf://lab/"]},
        ["spec.model.source is 'hf://labs/model'; the profile allows sources that begin with s3://, hf://lab/"],
    ),
}


@pytest.mark.parametrize(("spec", "changes", "words"), ALLOWED.values(), ids=ALLOWED)
def test_what_the_profile_does_not_allow_is_said_in_sentences(
    spec: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    found = not_permitted(run(**spec).spec, profile(**changes))
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


PATHS = {
    "a relative model": ({"model": {"source": "base"}}, "spec.model.source is 'base'"),
    "relative data": ({"data": {"sources": [{"uri": "pictures"}]}}, "spec.data.sources\\[0\\].uri is 'pictures'"),
    "relative references": (
        {
            "model": {"family": "flux_kontext", "flavour": None},
            "data": {"sources": [{"uri": "s3://bucket/a", "references": ["originals"]}]},
        },
        "spec.data.sources\\[0\\].references\\[0\\] is 'originals'",
    ),
    "relative conditioning pictures": (
        {
            "model": {"family": "sdxl", "flavour": None},
            "adapter": {"type": "controlnet"},
            "data": {"sources": [{"uri": "s3://bucket/a", "conditioning": "edges"}]},
        },
        "spec.data.sources\\[0\\].conditioning is 'edges'",
    ),
    "the default store": ({"storage": {"uri": "runs"}}, "spec.storage.uri is 'runs'"),
    "a relative picture": (
        {
            "model": {"family": "wan"},
            "storage": {"uri": "s3://bucket/runs"},
            "validation": {"prompts": [{"text": "a", "image": "first.png"}]},
        },
        "spec.validation.prompts\\[0\\].image is 'first.png'",
    ),
    "a relative bundle": (
        {"storage": {"uri": "s3://bucket/runs", "s3": {"caBundle": "ca.pem"}}},
        "spec.storage.s3.caBundle is 'ca.pem'",
    ),
}


@pytest.mark.parametrize(("spec", "words"), PATHS.values(), ids=PATHS)
def test_a_path_that_means_nothing_in_a_pod_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}.*absolute path of a volume") as caught:
        cluster_run_file(run(**spec), profile(), uid="u", attempt=1, scratch="/scratch")
    assert not isinstance(caught.value, DoesNotFit)


def test_a_run_that_does_not_fit_is_told_apart_from_one_that_cannot_work() -> None:
    large = run(model={"family": "flux"}, adapter={"type": "full"}, parallelism={"gpuClass": "l4-24g"})
    with pytest.raises(DoesNotFit, match="does not fit"):
        cluster_run_file(large, profile(), uid="u", attempt=1, scratch="/scratch")


SOURCES = {
    "a volume": ("/models/base", "/models/base"),
    "a hub": ("hf://owner/name", "/scratch/model"),
    "a bucket": ("s3://bucket/model", "/scratch/model"),
}


@pytest.mark.parametrize(("source", "folder"), SOURCES.values(), ids=SOURCES)
def test_the_run_file_has_the_paths_of_the_pods(source: str, folder: str) -> None:
    of = run(model={"source": source}, schedule={"activeDeadlineSeconds": 60})
    run_file = cluster_run_file(of, profile(), uid="u-1", attempt=3, scratch="/scratch")
    assert (run_file.model_folder, run_file.scratch, run_file.cache_uri) == (folder, "/scratch/run", "/scratch/cache")
    assert run_file.store_uri == "s3://bucket/runs/art/knight-u-1"
    assert run_file.attempt == "3.0"
    assert run_file.spec.schedule.active_deadline_seconds is None, "the operator watches it, over all attempts"
    assert (run_file.plan.nodes, run_file.plan.device) == (2, "cuda")


def test_the_profiles_store_is_the_run_files() -> None:
    run_file = cluster_run_file(
        run(storage={"uri": "runs"}), profile(storage=STORE), uid="u", attempt=1, scratch="/scratch"
    )
    assert run_file.store_uri == "s3://shared/runs/art/knight-u"
