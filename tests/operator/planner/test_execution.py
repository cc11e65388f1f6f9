"""Strategy, micro-batch and recompute for a table of runs, and the RunFile made of them."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atelier_api.errors import ConfigError
from atelier_api.families import FAMILIES
from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import Machine, Paths, plan, resolve, table_facts
from atelier_operator.planner.strategy import best_fit
from planned_runs import cpu, gpu, run
from run_documents import Document, sound_documents


def planned(of: TrainingRun, machine: Machine) -> tuple[str, int, bool]:
    """Strategy, micro-batch and recompute."""
    execution = plan(of, table_facts(of.spec.model), machine)
    return execution.strategy, execution.micro_batch_size, execution.gradient_checkpointing


def batch(size: int, gpus: int = 1) -> dict[str, Any]:
    return {"hyperparameters__globalBatchSize": size, "parallelism__gpusPerNode": gpus}


CHOICES: dict[str, tuple[TrainingRun, Machine, tuple[str, int, bool]]] = {
    "one GPU, one sample": (run(), gpu(80), ("single", 1, False)),
    "a batch is accumulated before it is recomputed": (run(**batch(8)), gpu(80), ("single", 1, False)),
    "a small picture leaves room for the batch": (run(**batch(8), data__resolution=256), gpu(80), ("single", 8, False)),
    "no more than eight samples at once": (
        run("sdxl", **batch(64), data__resolution=256),
        gpu(80),
        ("single", 8, False),
    ),
    "a divisor of the batch": (run("sdxl", **batch(7), data__resolution=256), gpu(80), ("single", 7, False)),
    "recompute on a smaller device": (run(**batch(8)), gpu(40), ("single", 4, True)),
    "DDP on two that hold the model": (run(**batch(2, 2)), gpu(80), ("ddp", 1, False)),
    "DDP with recompute before FSDP2": (run(**batch(2, 2)), gpu(40), ("ddp", 1, True)),
    "FSDP2 where one does not hold it": (run(**batch(8, 8)), gpu(24), ("fsdp2", 1, True)),
    "FSDP2 for a whole model": (run(adapter={"type": "full"}, **batch(8, 8)), gpu(80), ("fsdp2", 1, False)),
    "what the user says": (
        run(
            **batch(8, 2),
            parallelism__strategy="fsdp2",
            hyperparameters__microBatchSize=2,
            hyperparameters__gradientCheckpointing=True,
        ),
        gpu(80),
        ("fsdp2", 2, True),
    ),
    "ZeRO-2 where its gradients and moments are shared out": (
        run("sdxl", adapter={"type": "full"}, **batch(8, 8), parallelism__strategy="deepspeed-zero2"),
        gpu(40),
        ("deepspeed-zero2", 1, False),
    ),
    "a single strategy on one process": (run(parallelism__strategy="fsdp2"), gpu(80), ("fsdp2", 1, False)),
    "nodes count": (
        run("sdxl", parallelism={"nodes": 2, "gpusPerNode": 1}, hyperparameters__globalBatchSize=2),
        gpu(80),
        ("ddp", 1, False),
    ),
    "unknown memory: the most frugal": (run(**batch(8)), gpu(), ("single", 1, True)),
    "unknown memory, several": (run(**batch(8, 2)), gpu(), ("ddp", 1, True)),
    "the CPU": (run("sdxl", parallelism={"gpusPerNode": 0}, data__resolution=512), cpu(64), ("single", 1, False)),
}


@pytest.mark.parametrize(("of", "machine", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_first_choice_that_fits_is_taken(
    of: TrainingRun, machine: Machine, expected: tuple[str, int, bool]
) -> None:
    assert planned(of, machine) == expected


def test_the_plan_names_what_the_runtime_needs() -> None:
    of = run(
        "sdxl", hyperparameters__globalBatchSize=64, parallelism={"nodes": 2, "gpusPerNode": 2}, data__resolution=256
    )
    execution = plan(of, table_facts(of.spec.model), gpu(80))
    assert (execution.nodes, execution.processes_per_node, execution.world_size) == (2, 2, 4)
    assert execution.micro_batch_size * execution.gradient_accumulation * execution.world_size == 64
    assert execution.device == "cuda"
    assert execution.threads_per_process == 0
    assert execution.device_memory_bytes == 80 << 30
    assert 0 < execution.predicted_peak_memory_bytes <= 0.94 * (80 << 30)


def test_few_steps_of_a_checkpoint_of_two_networks_are_not_planned() -> None:
    twin = run("wan", hyperparameters__ema={}, objective__twinFlow={})
    one = table_facts(twin.spec.model)
    assert plan(twin, one, gpu(80)).strategy == "single"
    with pytest.raises(
        ConfigError, match=r"^spec\.model\.source is .*; has 2 networks, and spec\.objective\.twinFlow trains one"
    ):
        plan(twin, replace(one, experts=2), gpu(80))


@pytest.mark.parametrize(
    ("adapter", "given_rate", "expected"),
    [("lora", None, 1e-4), ("boft", None, 1e-4), ("ia3", None, 3e-3), ("full", None, 1e-5), ("lora", "3e-4", 3e-4)],
)
def test_the_learning_rate_is_the_users_or_the_adapters(adapter: str, given_rate: str | None, expected: float) -> None:
    of = run("sdxl", adapter={"type": adapter}, hyperparameters__learningRate=given_rate)
    assert plan(of, table_facts(of.spec.model), gpu(80)).learning_rate == expected


def test_words_are_learnt_at_the_rate_of_diffusers_example() -> None:
    tokens = [{"token": "<fox>", "initializer": "fox"}]
    of = run("sdxl", adapter={"type": "textual-inversion", "tokens": tokens})
    assert plan(of, table_facts(of.spec.model), gpu(80)).learning_rate == 5e-4


@pytest.mark.parametrize(("cores", "processes", "threads"), [(8, 2, 4), (2, 2, 1), (1, 2, 1), (7, 2, 3)])
def test_cores_are_dealt_out_to_the_processes_of_the_cpu(cores: int, processes: int, threads: int) -> None:
    of = run(
        "sdxl",
        parallelism={"gpusPerNode": 0, "processesPerNode": processes},
        hyperparameters__globalBatchSize=2,
        data__resolution=256,
    )
    assert plan(of, table_facts(of.spec.model), cpu(128, cores)).threads_per_process == threads


def test_processes_on_the_cpu_share_its_memory() -> None:
    of = run(
        "sdxl",
        parallelism={"gpusPerNode": 0, "processesPerNode": 4},
        hyperparameters__globalBatchSize=4,
        data__resolution=256,
    )
    assert plan(of, table_facts(of.spec.model), cpu(64)).device_memory_bytes == 16 << 30


def test_the_memory_in_the_spec_goes_before_what_was_found() -> None:
    of = run(parallelism__deviceMemory="24Gi")
    with pytest.raises(ConfigError, match=r"the device has 22\.6 usable of 24 "):
        plan(of, table_facts(of.spec.model), gpu(80))
    assert planned(run(parallelism__deviceMemory="40960Mi"), gpu(8)) == ("single", 1, True)


def test_unknown_memory_refuses_nothing() -> None:
    of = run("wan", model__flavour="2.2-t2v-a14b", adapter={"type": "full"})
    execution = plan(of, table_facts(of.spec.model), gpu())
    assert execution.device_memory_bytes is None
    assert execution.gradient_checkpointing


quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@quick
@given(sound_documents(), st.sampled_from([None, 1, 24, 80, 100000]))
def test_every_valid_run_is_planned_or_refused_in_a_sentence(drawn: Document, gibibytes: int | None) -> None:
    of = TrainingRun.model_validate(_with_type(drawn))
    device = cpu(gibibytes) if of.spec.parallelism.gpus_per_node == 0 else gpu(gibibytes)
    execution = planned_or_refused(of, device)
    if execution is None:
        return
    product = execution.micro_batch_size * execution.gradient_accumulation * execution.world_size
    assert product == of.spec.hyperparameters.global_batch_size
    assert (
        execution.device_memory_bytes is None or execution.predicted_peak_memory_bytes <= execution.device_memory_bytes
    )
    file = resolve(of, execution, paths(len(of.spec.data.sources)))
    assert type(file).model_validate_json(file.model_dump_json(by_alias=True)) == file


def planned_or_refused(of: TrainingRun, device: Machine) -> ExecutionPlan | None:
    """The plan; None when the run was refused, and rightly in words."""
    model = table_facts(of.spec.model)
    if best_fit(of.spec, model, device) is not None:
        return plan(of, model, device)
    with pytest.raises(ConfigError, match=r"does not fit: needs .*spec\.parallelism\.deviceMemory"):
        plan(of, model, device)
    return None


def paths(sources: int = 1) -> Paths:
    uris = tuple(f"/data/{index}" for index in range(sources))
    return Paths(
        model_folder="/model", data_uris=uris, storage_uri="/runs", scratch="/runs/.scratch/a", cache_uri="/runs/.cache"
    )


def _with_type(drawn: Document) -> Document:
    adapter = {"type": "lora"} | drawn["spec"].get("adapter", {})
    return drawn | {"spec": drawn["spec"] | {"adapter": adapter}}


def resolved(of: TrainingRun) -> Any:
    return resolve(of, plan(of, table_facts(of.spec.model), gpu()), paths())


def test_the_run_file_has_absolute_places_and_the_identity() -> None:
    file = resolved(run())
    assert (file.identity.namespace, file.identity.name, file.identity.uid) == ("default", "small", "local")
    assert [source.uri for source in file.spec.data.sources] == ["/data/0"]
    assert file.store_uri == "/runs/default/small-local"
    assert (file.model_folder, file.scratch, file.cache_uri) == ("/model", "/runs/.scratch/a", "/runs/.cache")


def test_the_run_file_has_what_the_spec_leaves_to_the_family() -> None:
    picture = resolved(run(data__resolution=1000)).spec
    assert picture.data.bucket_align == 64
    assert (picture.validation.width, picture.validation.height, picture.validation.frames) == (992, 992, None)
    clip = resolved(run("wan", data__clip__frames=81)).spec
    assert clip.data.clip.fps == FAMILIES["wan"].frame_rate
    assert clip.validation.frames == 81


def test_the_run_file_of_sounds_has_their_length_and_no_pixels() -> None:
    sounds = resolved(run("ace_step", data__audio__maxSeconds=90)).spec
    assert (sounds.validation.seconds, sounds.validation.width, sounds.data.bucket_align) == (90, None, None)
    said = run("ace_step", validation={"prompts": [{"text": "a waltz"}], "seconds": 20})
    assert resolved(said).spec.validation.seconds == 20


def test_the_run_file_has_no_size_of_samples_that_follows_their_reference() -> None:
    validation = resolved(run("longcat_image_edit", data__resolution=1000)).spec.validation
    assert (validation.width, validation.height) == (None, None)


def test_what_the_user_says_stays_in_the_run_file() -> None:
    size = {"prompts": [{"text": "x"}], "width": 512, "height": 768}
    spec = resolved(run(data__bucketAlign=32, validation=size)).spec
    assert (spec.data.bucket_align, spec.validation.width, spec.validation.height) == (32, 512, 768)


def test_kohya_is_left_out_for_a_whole_model_and_kept_for_lora() -> None:
    assert resolved(run("sdxl", adapter={"type": "full"})).spec.publish.formats == ["diffusers"]
    assert resolved(run("sdxl")).spec.publish.formats == ["diffusers", "kohya"]


def test_a_type_of_lycoris_lora_is_published_in_its_layout_alone() -> None:
    assert resolved(run("sdxl", adapter={"type": "lokr"})).spec.publish.formats == ["lycoris"]


def test_the_planner_imports_neither_torch_nor_a_client() -> None:
    code = "import sys, atelier_operator.planner.local; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "torch",
        "numpy",
        "diffusers",
        "transformers",
        "safetensors",
        "boto3",
        "kubernetes",
        "kopf",
        "typer",
        "atelier_runtime",
    }
    assert heavy.isdisjoint(loaded)
    assert {"atelier_api", "pydantic", "yaml"} <= set(loaded)


@pytest.mark.parametrize("clip", [None, "2.5"], ids=["default", "given"])
def test_no_family_forces_a_limit_of_the_gradient(clip: str | None) -> None:
    given = {} if clip is None else {"hyperparameters__gradientClip": clip}
    limits = {resolved(run(name, **given)).spec.hyperparameters.gradient_clip for name in FAMILIES}
    assert limits == {1.0 if clip is None else 2.5}
