"""Advice for a run that does not fit is followed here, and then fits."""

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atelier_api.errors import ConfigError
from atelier_api.read import problems
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import Machine, plan, table_facts
from atelier_operator.planner.advice import Advice, advice, changed, gib
from atelier_operator.planner.strategy import best_fit
from planned_runs import cpu, gpu, run
from run_documents import Document, sound_documents

PROMPTS = {"prompts": [{"text": "a cat"}]}
FULL = {"type": "full"}


def refused(of: TrainingRun, machine: Machine) -> str:
    with pytest.raises(ConfigError) as refusal:
        plan(of, table_facts(of.spec.model), machine)
    return str(refusal.value)


def test_a_refusal_says_what_is_needed_what_there_is_where_to_change_it_and_what_would_fit() -> None:
    assert re.fullmatch(
        r"flux dev does not fit: needs [\d.]+ GiB, the device has 22\.6 usable of 24 \(spec\.parallelism\.deviceMemory\); "
        r"would fit: spec\.parallelism\.gpusPerNode 2 with spec\.hyperparameters\.globalBatchSize 2 \([\d.]+ GiB\), "
        r"or spec\.model\.quantization int8 \([\d.]+ GiB\)",
        refused(run(), gpu(24)),
    )


REFUSED: dict[str, tuple[TrainingRun, Machine, tuple[str, ...]]] = {
    "a whole SDXL on 24 GiB": (
        run("sdxl", adapter=FULL),
        gpu(24),
        ("spec.parallelism.gpusPerNode 4", "spec.hyperparameters.optimizer.type adamw-bf16", "spec.adapter.type lora"),
    ),
    "no recompute": (
        run("sdxl", hyperparameters__gradientCheckpointing=False),
        gpu(12),
        ("spec.hyperparameters.gradientCheckpointing true", "spec.data.resolution 768"),
    ),
    "large micro-batches": (
        run("sdxl", hyperparameters={"steps": 1, "globalBatchSize": 64, "microBatchSize": 64}),
        gpu(16),
        ("spec.hyperparameters.microBatchSize 1",),
    ),
    "DDP of what has to be sharded": (
        run(parallelism={"strategy": "ddp", "gpusPerNode": 4}, hyperparameters__globalBatchSize=4),
        gpu(24),
        ("spec.parallelism.strategy fsdp2",),
    ),
    "ZeRO-2 of what has to be sharded": (
        run(parallelism={"strategy": "deepspeed-zero2", "gpusPerNode": 4}, hyperparameters__globalBatchSize=4),
        gpu(24),
        ("spec.parallelism.strategy deepspeed-zero3",),
    ),
    "a large rank": (run("z_image", adapter={"rank": 1024}), gpu(24), ("spec.adapter.rank 128",)),
    "long clips": (
        run("wan", data={"sources": [{"uri": "a"}], "resolution": 832, "clip": {"frames": 1025}}),
        gpu(24),
        ("spec.data.clip.frames 61",),
    ),
    "long sounds": (
        run(
            "ace_step",
            data__audio__maxSeconds=600,
            hyperparameters__globalBatchSize=8,
            model__autoencoderTiling="never",
        ),
        gpu(16),
        ("spec.model.autoencoderTiling auto", "spec.data.audio.maxSeconds 150"),
    ),
    "samples beside the state": (
        run("wan", data__resolution=256, data__clip__frames=5, validation=PROMPTS),
        gpu(15),
        ("spec.validation without prompts",),
    ),
    "a moving average of everything": (
        run("sdxl", adapter=FULL, hyperparameters__ema={"decay": "0.99"}),
        gpu(56),
        ("spec.hyperparameters.ema off",),
    ),
    "fp32": (
        run("sdxl", hyperparameters={"steps": 1, "precision": "fp32"}, parallelism={"gpusPerNode": 0}),
        cpu(12),
        ("spec.hyperparameters.precision bf16",),
    ),
    "several things at once": (
        run("flux", adapter=FULL, hyperparameters__ema={"decay": "0.99"}),
        gpu(12),
        ("spec.model.quantization nf4 with spec.adapter.type lora",),
    ),
}


@pytest.mark.parametrize(("of", "machine", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_advised_is_named_and_fits(of: TrainingRun, machine: Machine, expected: tuple[str, ...]) -> None:
    sentence = refused(of, machine)
    for part in expected:
        assert part in sentence
    followed(of, machine)


def followed(of: TrainingRun, machine: Machine) -> None:
    """Every piece of advice makes a valid run, which fits with the peak that was promised."""
    model = table_facts(of.spec.model)
    for each in advice(of, model, machine):
        other = changed(of, each.changes)
        assert other is not None
        assert problems(other.model_dump(mode="json", by_alias=True)) == []
        assert plan(other, model, machine).predicted_peak_memory_bytes == each.peak


def test_where_nothing_helps_the_refusal_says_so() -> None:
    assert refused(run("wan"), gpu(8)).endswith("; no other setting that was tried fits either")


def test_changes_that_make_no_valid_run_are_no_advice() -> None:
    assert changed(run(), {"spec.adapter.rank": 0}) is None
    assert changed(run(), {"spec.adapter.rank": 8}) == run(adapter={"rank": 8})


quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@quick
@given(sound_documents(), st.sampled_from([6, 16, 40]))
def test_advice_for_any_run_can_be_followed(drawn: Document, gibibytes: int) -> None:
    adapter = {"type": "lora"} | drawn["spec"].get("adapter", {})
    of = TrainingRun.model_validate(drawn | {"spec": drawn["spec"] | {"adapter": adapter, "parallelism": _free(drawn)}})
    machine = cpu(gibibytes) if of.spec.parallelism.gpus_per_node == 0 else gpu(gibibytes)
    if best_fit(of.spec, table_facts(of.spec.model), machine) is None:
        followed(of, machine)


def _free(drawn: Document) -> dict[str, Any]:
    """The parallelism without a memory of its own."""
    return drawn["spec"].get("parallelism", {}) | {"deviceMemory": None}


@pytest.mark.parametrize(("size", "text"), [(80 << 30, "80"), (97_931_000_000, "91.2"), (0, "0"), (1 << 28, "0.2")])
def test_sizes_are_in_gib_with_one_digit(size: int, text: str) -> None:
    assert gib(size) == text


def test_advice_reads_as_settings() -> None:
    changes = {"spec.a": True, "spec.ema": None, "spec.adapter": {"type": "lora"}, "spec.validation": {}, "spec.b": 3}
    parts = (
        "spec.a true with spec.ema off with spec.adapter.type lora with spec.validation without prompts with spec.b 3"
    )
    assert str(Advice(changes, 1 << 30)) == f"{parts} (1 GiB)"
