"""What fields must be to each other: one row for each rule, refused and accepted."""

from typing import Any

import pytest

from atelier_api.read import problems
from atelier_api.rules import notes, processes_per_node, world_size
from atelier_api.v1alpha1 import TrainingRun
from atelier_api.v1alpha1.parallelism import DEEPSPEED
from run_documents import document

WAN = {"family": "wan", "source": "base"}
SDXL = {"family": "sdxl", "source": "base"}
FOX = {"token": "<fox>", "initializer": "fox"}
KONTEXT = {"family": "flux_kontext", "source": "base"}
CASCADE = {"family": "stable_cascade", "source": "base"}
SHOWN = [{"text": "a cat", "image": "a.png"}]
CONTROLNET = {"type": "controlnet"}
CONDITIONED = [{"uri": "a", "conditioning": "edges"}]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frames of pictures": (
        {"data__clip__frames": 81},
        "spec.data.clip.frames is 81; only for video families, and flux is of image",
    ),
    "a frame rate of pictures": ({"data__clip__fps": "12"}, "spec.data.clip.fps is '12'; only for video families"),
    "a diffusion option of a flow family": (
        {"objective__minSnrGamma": "5"},
        "spec.objective.minSnrGamma is '5'; only for diffusion families, and flux is of flow",
    ),
    "noise of a flow family": (
        {"objective__noise__offset": "0.1"},
        "spec.objective.noise.offset is '0.1'; only for diffusion families",
    ),
    "a prediction of a flow family": (
        {"objective__prediction": "v"},
        "spec.objective.prediction is 'v'; only for diffusion families",
    ),
    "a density of a diffusion family": (
        {"model": SDXL, "objective__timesteps__sampling": "uniform"},
        "spec.objective.timesteps.sampling is 'uniform'; only for flow families or with spec.objective.diff2Flow, and sdxl is of",
    ),
    "a shift of a diffusion family": (
        {"model": SDXL, "objective__timesteps__shift": "3"},
        "spec.objective.timesteps.shift is '3'; only for flow families",
    ),
    "zero terminal SNR of epsilon": (
        {"model": SDXL, "objective": {"prediction": "epsilon", "noise": {"zeroTerminalSnr": True}}},
        "spec.objective.noise.zeroTerminalSnr is true; only for prediction v",
    ),
    "a velocity of a flow family": (
        {"objective__diff2Flow": {}},
        "spec.objective.diff2Flow is a mapping; only for diffusion families, and flux is of flow",
    ),
    "a velocity of a cosine": (
        {"model": CASCADE, "objective__diff2Flow": {}},
        "spec.objective.diff2Flow is a mapping; only for families with betas, and stable_cascade is of cosine",
    ),
    "a velocity with another loss": (
        {"model": SDXL, "objective": {"diff2Flow": {}, "loss": "huber"}},
        "spec.objective.loss is 'huber'; must be l2 with spec.objective.diff2Flow",
    ),
    "a velocity weighed twice": (
        {"model": SDXL, "objective": {"diff2Flow": {"maxWeight": "10"}, "minSnrGamma": "5"}},
        "spec.objective.minSnrGamma is 5.0; spec.objective.diff2Flow weighs the loss itself",
    ),
    "a shift by tokens of a velocity": (
        {"model": SDXL, "objective": {"diff2Flow": {}, "timesteps": {"shift": "dynamic"}}},
        "spec.objective.timesteps.shift is 'dynamic'; with spec.objective.diff2Flow it must be auto, none or a number",
    ),
    "c of another loss": ({"objective__huberC": "0.2"}, "spec.objective.huberC is '0.2'; only for loss huber"),
    "a parameter of another density": (
        {"objective__timesteps__betaA": "3"},
        "spec.objective.timesteps.betaA is '3'; only for sampling beta",
    ),
    "the end of a constant": (
        {"hyperparameters__schedule__end": "0.1"},
        "spec.hyperparameters.schedule.end is '0.1'; only for type linear or cosine or polynomial",
    ),
    "the power of a line": (
        {"hyperparameters__schedule": {"type": "linear", "power": "2"}},
        "spec.hyperparameters.schedule.power is '2'; only for type polynomial",
    ),
    "samples without prompts": (
        {"validation__everySteps": 100},
        "spec.validation.everySteps is 100; only with spec.validation.prompts",
    ),
    "a batch that cannot be dealt out": (
        {"hyperparameters__globalBatchSize": 3, "parallelism": {"nodes": 2, "gpusPerNode": 2}},
        "spec.hyperparameters.globalBatchSize is 3; must be a multiple of 4 (2 nodes × 2 processes), for example 4",
    ),
    "a batch that cannot be cut": (
        {"hyperparameters": {"steps": 1, "globalBatchSize": 6, "microBatchSize": 4}},
        "spec.hyperparameters.globalBatchSize is 6; must be a multiple of 4 (1 node × 1 process × microBatchSize 4), for example 8",
    ),
    "a warm-up longer than the run": (
        {"hyperparameters": {"steps": 9, "schedule": {"warmupSteps": 10}}},
        "spec.hyperparameters.schedule.warmupSteps is 10; must be at most spec.hyperparameters.steps, which is 9",
    ),
    "a whole fp32 model in bf16": (
        {
            "adapter": {"type": "full"},
            "hyperparameters": {"steps": 1, "precision": "fp32", "optimizer": {"type": "adamw-bf16"}},
        },
        "spec.hyperparameters.optimizer.type is 'adamw-bf16'; with adapter type full it would round",
    ),
    "a prediction that the sampler of a cosine does not know": (
        {"model": CASCADE, "objective__prediction": "v"},
        "spec.objective.prediction is 'v'; only for families with betas, and stable_cascade is of cosine",
    ),
    "a whole model with a quantised base": (
        {"adapter": {"type": "full"}, "model__quantization": "int8"},
        "spec.model.quantization is 'int8'; with adapter type full the base itself is trained, which needs it whole; "
        "remove it, or set type lora",
    ),
    "processes beside GPUs": (
        {"parallelism__processesPerNode": 2},
        "spec.parallelism.processesPerNode is 2; only for gpusPerNode 0, which is 1",
    ),
    "a single process of two": (
        {"parallelism": {"strategy": "single", "gpusPerNode": 2}, "hyperparameters__globalBatchSize": 2},
        "spec.parallelism.strategy is 'single'; needs one process, and the run has 2; use ddp or fsdp2",
    ),
    "DeepSpeed on one process": (
        {"parallelism__strategy": "deepspeed-zero3"},
        "spec.parallelism.strategy is 'deepspeed-zero3'; shards over the processes, and the run has 1; set more, or strategy single",
    ),
    "DeepSpeed with weights in bf16": (
        {
            "parallelism": {"strategy": "deepspeed-zero2", "gpusPerNode": 2},
            "hyperparameters": {"steps": 1, "globalBatchSize": 2, "optimizer": {"type": "adamw-bf16"}},
        },
        "spec.parallelism.strategy is 'deepspeed-zero2'; trains fp32 weights, and spec.hyperparameters.optimizer.type is "
        "adamw-bf16; set type adamw, or strategy fsdp2",
    ),
    "DeepSpeed with a control network": (
        {
            "model": SDXL,
            "adapter": CONTROLNET,
            "data__sources": CONDITIONED,
            "parallelism": {"strategy": "deepspeed-zero3", "gpusPerNode": 2},
            "hyperparameters__globalBatchSize": 2,
        },
        "spec.parallelism.strategy is 'deepspeed-zero3'; trains no network beside its base, as spec.adapter.type controlnet does; "
        "set ddp or fsdp2",
    ),
    "DeepSpeed with words of text encoders": (
        {
            "model": SDXL,
            "adapter": {"type": "textual-inversion", "tokens": [FOX]},
            "parallelism": {"strategy": "deepspeed-zero2", "gpusPerNode": 2},
            "hyperparameters__globalBatchSize": 2,
        },
        "spec.parallelism.strategy is 'deepspeed-zero2'; trains no words of text encoders, as spec.adapter.type textual-inversion "
        "does; set ddp or fsdp2",
    ),
    **{
        f"DeepSpeed's {strategy} with a quantised base": (
            {
                "model__quantization": "nf4",
                "parallelism": {"strategy": strategy, "gpusPerNode": 2},
                "hyperparameters__globalBatchSize": 2,
            },
            f"spec.parallelism.strategy is '{strategy}'; does not share out packed weights, and spec.model.quantization is nf4; "
            "remove that, or set ddp or fsdp2",
        )
        for strategy in DEEPSPEED
    },
    "no memory": ({"parallelism__deviceMemory": "0Gi"}, "spec.parallelism.deviceMemory is '0Gi'; must be more than 0"),
    "a picture at a place that nothing can read": (
        {"model": WAN, "validation__prompts": [SHOWN[0] | {"image": "gs://x/y"}]},
        "spec.validation.prompts[0].image is 'gs://x/y'; must be a file or s3://bucket/key",
    ),
    "a format twice": (
        {"publish__formats": ["kohya", "kohya"]},
        "spec.publish.formats is ['kohya', 'kohya']; must name each format once",
    ),
    "a source twice": (
        {"data__sources": [{"uri": "a"}, {"uri": "b"}, {"uri": "a/"}]},
        "spec.data.sources[2].uri is 'a/'; sources[0] is the same; to weigh it more, set its repeats",
    ),
    "a bucket in capitals": (
        {"storage__uri": "s3://Runs"},
        "spec.storage.uri is 's3://Runs'; must be s3://bucket/prefix",
    ),
    "a store of another kind": (
        {"data__sources": [{"uri": "gs://bucket/x"}]},
        "spec.data.sources[0].uri is 'gs://bucket/x'; must be a folder or s3://bucket/prefix",
    ),
    "a model elsewhere": (
        {"model__source": "gs://models/flux"},
        "spec.model.source is 'gs://models/flux'; must be a folder or hf://owner/name or s3://bucket/prefix",
    ),
    "a model in a bucket in capitals": (
        {"model__source": "s3://Models/flux"},
        "spec.model.source is 's3://Models/flux'; must be s3://bucket/prefix",
    ),
    "references of another store": (
        {"model": KONTEXT, "data__sources": [{"uri": "a", "references": ["gs://bucket/x"]}]},
        "spec.data.sources[0].references[0] is 'gs://bucket/x'; must be a folder or s3://bucket/prefix",
    ),
    "a picture to edit of another store": (
        {"model": KONTEXT, "validation__prompts": [{"text": "make it red", "references": ["gs://bucket/x.png"]}]},
        "spec.validation.prompts[0].references[0] is 'gs://bucket/x.png'; must be a file or s3://bucket/key",
    ),
    "a hub source without owner": (
        {"model__source": "hf://FLUX.1-dev"},
        "spec.model.source is 'hf://FLUX.1-dev'; must be hf://owner/name, with an optional @revision",
    ),
    "a revision of a folder": (
        {"model__revision": "main"},
        "spec.model.revision is 'main'; only an hf:// source has one, not 'base'",
    ),
    "two revisions": (
        {"model__source": "hf://a/b@c", "model__revision": "d"},
        "spec.model.revision is 'd'; the source 'hf://a/b@c' names one too; keep one",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_broken_rule_is_one_sentence_that_says_what_is_allowed(changes: dict[str, Any], sentence: str) -> None:
    found = [str(problem) for problem in problems(document(**changes))]
    assert len(found) == 1
    assert found[0].startswith(sentence)


ACCEPTED: dict[str, dict[str, Any]] = {
    "the default of an option that would do nothing": {"data__clip__frames": 49, "objective__huberC": "1e-1"},
    "v with zero terminal SNR": {"model": SDXL, "objective": {"prediction": "v", "noise": {"zeroTerminalSnr": True}}},
    "a velocity with a density and a shift": {
        "model": SDXL,
        "objective": {"diff2Flow": {"maxWeight": "20"}, "timesteps": {"sampling": "uniform", "shift": "3"}},
    },
    "processes on the CPU": {
        "parallelism": {"gpusPerNode": 0, "processesPerNode": 2},
        "hyperparameters__globalBatchSize": 4,
    },
    "places": {
        "data__sources": [{"uri": "s3://data/a"}, {"uri": "~/b"}, {"uri": "../c d"}],
        "storage__uri": "s3://runs",
    },
    "a hub source": {"model__source": "hf://black-forest-labs/FLUX.1-dev@refs/pr/1"},
    "min-SNR on a cosine": {"model": CASCADE, "objective__minSnrGamma": "5"},
    "a quantised base": {"model__quantization": "nf4"},
    "a model in a bucket": {"model__source": "s3://models/flux/"},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_a_sound_run_has_no_problem(changes: dict[str, Any]) -> None:
    assert problems(document(**changes)) == []


def test_a_rule_with_two_reasons_names_the_field_once() -> None:
    changed = document(model=SDXL, objective__timesteps__betaA="3", validation={"frames": 9})
    assert sorted(problem.path for problem in problems(changed)) == [
        "spec.objective.timesteps.betaA",
        "spec.validation.frames",
    ]


def test_kohya_of_a_whole_model_is_noted_where_something_else_is_published() -> None:
    run = TrainingRun.model_validate(document(adapter={"type": "full"}))
    assert notes(run) == ["spec.publish.formats: kohya is left out; that layout does not hold an adapter of type full"]
    assert notes(TrainingRun.model_validate(document())) == []


def test_layouts_that_cannot_hold_a_type_of_lycoris_lora_are_noted() -> None:
    run = TrainingRun.model_validate(document(adapter={"type": "lokr"}))
    assert notes(run) == [
        "spec.publish.formats: diffusers and kohya are left out; these layouts do not hold an adapter of type lokr"
    ]


@pytest.mark.parametrize(
    ("parallelism", "processes", "world"),
    [
        ({}, 1, 1),
        ({"nodes": 2, "gpusPerNode": 4}, 4, 8),
        ({"gpusPerNode": 0, "processesPerNode": 3}, 3, 3),
        ({"gpusPerNode": 0}, 1, 1),
    ],
)
def test_processes_are_gpus_or_what_is_asked_on_the_cpu(
    parallelism: dict[str, Any], processes: int, world: int
) -> None:
    spec = TrainingRun.model_validate(document(parallelism=parallelism)).spec
    assert (processes_per_node(spec), world_size(spec)) == (processes, world)
