"""Predicted memory against arithmetic, and against peaks measured on the real networks."""

from dataclasses import replace
from typing import Any

import pytest

from atelier_api.families import FAMILIES
from atelier_api.v1alpha1 import TrainingRun
from atelier_operator.planner import ModelFacts, Prediction, table_facts
from atelier_operator.planner.memory import (
    GIB,
    Choice,
    predict,
    trained_parameters,
)
from planned_runs import run

# Peak of a training step without what a process holds before it has a model: tensors alive at once in two steps of the published
# networks with AdamW, LoRA of rank 16, autocast and flash attention, counted with fake tensors (torch 2.13, diffusers 0.42).
# 1024 x 1024 pixels, one frame for clips. GiB with recompute, without.
MEASURED = {
    "flux dev": {"attention": (24.8, 50.0), "all": (25.7, 59.3)},
    "sd3 3.5-large": {"attention": (17.0, 32.7), "all": (17.6, 37.0)},
    "wan 2.1-t2v-1.3b": {"attention": (3.6, 13.7), "all": (4.0, 16.4)},
    "wan 2.1-t2v-14b": {"attention": (30.2, 70.7), "all": (30.8, 76.8)},
    "z_image turbo": {"attention": (14.0, 45.8), "all": (14.4, 50.8)},
    "sdxl base-1.0": {"attention": (5.7, 12.3), "all": (6.0, 13.6)},
}
VALUES_PER_SAMPLE = 643
"""That the autoencoder of sounds holds while it encodes, measured; 606 while it decodes."""

CASES = [
    (model, targets, recompute, peaks[0 if recompute else 1])
    for model, by_targets in MEASURED.items()
    for targets, peaks in by_targets.items()
    for recompute in (True, False)
]


def predicted(spec_of: TrainingRun, model: ModelFacts | None = None, **choice: Any) -> Prediction:
    chosen = Choice(
        **({"strategy": "single", "processes": 1, "micro_batch_size": 1, "gradient_checkpointing": False} | choice)
    )
    return predict(spec_of.spec, model or table_facts(spec_of.spec.model), chosen, "cuda")


@pytest.mark.parametrize(("model", "targets", "recompute", "peak"), CASES)
def test_the_prediction_is_near_the_measured_peak_and_hardly_ever_below(
    model: str, targets: str, recompute: bool, peak: float
) -> None:
    family, flavour = model.split(" ")
    clip = {"data__clip__frames": 1} if FAMILIES[family].modality == "video" else {}
    measured = run(family, model__flavour=flavour, adapter={"targets": [targets]}, **clip)
    parts = predicted(measured, gradient_checkpointing=recompute).train
    assert 0.96 * peak <= (parts.total - parts.overhead) / GIB <= 1.2 * peak


# Peak of live tensors of the trainer itself on an H200 (`make bench-gpu`, torch 2.11, diffusers 0.42, flash attention), the two steps
# after the second: GiB by family, rank, edge in pixels, batch and recompute. LoRA on `all`, bf16.
ON_A_GPU = [
    ("flux", 16, 1024, 1, False, 56.48),
    ("flux", 16, 1024, 1, True, 25.72),
    ("flux", 64, 1024, 4, True, 36.17),
    ("flux", 16, 512, 2, False, 45.31),
    ("sdxl", 16, 1024, 1, False, 13.81),
    ("sdxl", 16, 1024, 4, False, 38.78),
    ("sdxl", 16, 1024, 4, True, 8.43),
]


@pytest.mark.parametrize(("family", "rank", "edge", "batch", "recompute", "peak"), ON_A_GPU)
def test_the_prediction_is_at_most_a_tenth_above_the_peak_on_a_gpu_and_not_below(
    family: str, rank: int, edge: int, batch: int, recompute: bool, peak: float
) -> None:
    measured = run(family, adapter={"rank": rank, "targets": ["all"]}, data__resolution=edge)
    parts = predicted(measured, micro_batch_size=batch, gradient_checkpointing=recompute).train
    assert peak <= (parts.total - parts.overhead) / GIB <= 1.1 * peak


CONDITIONED = [{"uri": "pictures", "conditioning": "edges"}]

# Bytes per parameter of the runtime: fp32 weight, gradient and two moments are 16, autocast's copy 2; in bf16 all four are 8.
STATES = {
    "fp32": ({}, (4, 4, 8, 2)),
    "bf16": ({"hyperparameters__optimizer__type": "adamw-bf16"}, (2, 2, 4, 0)),
    "fp32 in fp32": ({"hyperparameters__precision": "fp32"}, (4, 4, 8, 0)),
}


@pytest.mark.parametrize(("changes", "each"), STATES.values(), ids=STATES)
def test_full_rank_state_is_bytes_per_parameter(changes: dict[str, Any], each: tuple[int, ...]) -> None:
    full = run("sdxl", adapter={"type": "full"}, **changes)
    parts, parameters = predicted(full).train, table_facts(full.spec.model).parameters
    state = (parts.trained_weights, parts.gradients, parts.optimizer, parts.copies)
    assert state == tuple(parameters * size for size in each)
    assert parts.base_weights == 0


@pytest.mark.parametrize(("changes", "each"), STATES.values(), ids=STATES)
def test_the_state_of_a_control_network_is_bytes_per_parameter_beside_the_frozen_base(
    changes: dict[str, Any], each: tuple[int, ...]
) -> None:
    controlled = run("sdxl", adapter={"type": "controlnet"}, data__sources=CONDITIONED, **changes)
    model = table_facts(controlled.spec.model)
    parts = predicted(controlled).train
    state = (parts.trained_weights, parts.gradients, parts.optimizer, parts.copies)
    assert state == tuple(model.control_parameters * size for size in each)
    assert parts.base_weights == model.parameters * (4 if "hyperparameters__precision" in changes else 2)


def test_fsdp_shards_the_base_and_the_control_network() -> None:
    controlled = run(
        "flux", adapter={"type": "controlnet"}, data__sources=CONDITIONED, parallelism__gpusPerNode=4,
        hyperparameters__globalBatchSize=4,
    )  # fmt: skip
    model = table_facts(controlled.spec.model)
    parts = predicted(controlled, strategy="fsdp2", processes=4).train
    assert parts.base_weights == -(-2 * model.parameters // 4)
    assert parts.optimizer == -(-8 * model.control_parameters // 4)


def test_drawing_with_a_control_network_is_a_phase_of_its_own() -> None:
    prompts = [{"text": "a", "conditioning": "a.png", "conditioningScale": "1"}]
    drawn = run("sdxl", adapter={"type": "controlnet"}, data__sources=CONDITIONED, validation={"prompts": prompts})
    silent = run("sdxl", adapter={"type": "controlnet"}, data__sources=CONDITIONED)
    assert predicted(drawn).train == predicted(silent).train
    assert predicted(drawn).sample > predicted(silent).sample == 0


def test_lora_keeps_the_base_in_the_runs_precision() -> None:
    parameters = table_facts(run().spec.model).parameters
    assert predicted(run()).train.base_weights == 2 * parameters
    assert predicted(run(hyperparameters__precision="fp32")).train.base_weights == 4 * parameters


def test_a_moving_average_is_four_bytes_for_each_trained_parameter() -> None:
    averaged = run(hyperparameters__ema={"decay": "0.99"})
    assert predicted(run()).train.ema == 0
    assert predicted(averaged).train.ema == 4 * trained_parameters(averaged.spec, table_facts(averaged.spec.model))


# Trained parameters of peft on the published networks, rank 16, in millions (measured).
TRAINED = {
    ("flux", "dev", "attention"): 26.1,
    ("sd3", "3.5-large", "attention"): 23.6,
    ("sd3", "3.5-large", "all"): 52.8,
    ("wan", "2.1-t2v-1.3b", "attention"): 11.8,
    ("wan", "2.1-t2v-14b", "attention"): 52.4,
    ("sdxl", "base-1.0", "attention"): 23.2,
}


@pytest.mark.parametrize(("family", "flavour", "targets"), TRAINED)
def test_the_estimate_of_trained_parameters_is_rather_too_high(family: str, flavour: str, targets: str) -> None:
    counted = run(family, model__flavour=flavour, adapter={"targets": [targets]}).spec
    estimate = trained_parameters(counted, table_facts(counted.model)) / 1e6
    assert 0.97 * TRAINED[family, flavour, targets] <= estimate <= 2 * TRAINED[family, flavour, targets]


def test_expressions_count_as_every_target() -> None:
    expression, every = run(adapter={"targets": [r".*to_q"]}).spec, run(adapter={"targets": ["attention", "mlp"]}).spec
    model = table_facts(expression.model)
    assert trained_parameters(expression, model) == trained_parameters(every, model)
    assert trained_parameters(run(adapter={"targets": ["mlp"]}).spec, model) < trained_parameters(every, model)


def test_fsdp2_shards_the_base_of_an_adapter_and_replicates_the_adapter() -> None:
    alone, spread = predicted(run()).train, predicted(run(), strategy="fsdp2", processes=4).train
    assert spread.base_weights == -(-alone.base_weights // 4)
    assert (spread.trained_weights, spread.optimizer) == (alone.trained_weights, alone.optimizer)
    assert spread.copies == 2 * 2 * table_facts(run().spec.model).largest_block


def test_fsdp2_shards_the_whole_state_of_full_rank() -> None:
    full = run(adapter={"type": "full"})
    alone, spread = predicted(full).train, predicted(full, strategy="fsdp2", processes=8).train
    for part in ("trained_weights", "gradients", "optimizer"):
        assert getattr(spread, part) == -(-getattr(alone, part) // 8)
    assert spread.copies == (2 * 2 + 4) * table_facts(full.spec.model).largest_block


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_zero3_shards_everything(adapter: str) -> None:
    whole = run(adapter={"type": adapter})
    alone, spread = predicted(whole).train, predicted(whole, strategy="deepspeed-zero3", processes=8).train
    for part in ("base_weights", "trained_weights", "gradients", "optimizer"):
        assert getattr(spread, part) == -(-getattr(alone, part) // 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero3_casts_what_it_has_gathered_and_the_backward_pass_keeps_it_without_recomputation(
    checkpointing: bool,
) -> None:
    full = run(adapter={"type": "full"})
    spread = predicted(full, strategy="deepspeed-zero3", processes=8, gradient_checkpointing=checkpointing).train
    model = table_facts(full.spec.model)
    copied = 2 * model.largest_block if checkpointing else model.parameters
    assert spread.copies == 2 * 4 * model.largest_block + 2 * copied + (4 + 2) * model.largest_block


def test_zero2_shards_gradients_and_moments_and_keeps_its_part_of_the_weights_twice() -> None:
    full = run("sdxl", adapter={"type": "full"}, hyperparameters__ema={"decay": "0.99"})
    alone, spread = predicted(full).train, predicted(full, strategy="deepspeed-zero2", processes=8).train
    assert (spread.trained_weights, spread.ema) == (alone.trained_weights, alone.ema)
    assert spread.gradients == -(-alone.gradients // 8)
    assert spread.optimizer == -(-(alone.optimizer + alone.trained_weights) // 8)


def test_both_experts_have_weights_and_moments_and_one_a_gradient() -> None:
    two = run("wan", model__flavour="2.2-t2v-a14b")
    one = replace(table_facts(two.spec.model), experts=1)
    both, single = predicted(two).train, predicted(two, one).train
    assert both.base_weights == 2 * single.base_weights
    assert both.optimizer == 2 * single.optimizer
    assert both.gradients == single.gradients
    assert predicted(two, strategy="ddp", processes=2).train.gradients == 2 * single.gradients


def test_activations_grow_with_samples_pixels_frames_and_precision() -> None:
    def kept(spec_of: TrainingRun, **choice: Any) -> int:
        return predicted(spec_of, **choice).train.activations

    assert kept(run(), micro_batch_size=4) == 4 * kept(run())
    assert kept(run(data__resolution=512)) < kept(run()) / 2
    assert kept(run(hyperparameters__precision="fp32")) == 2 * kept(run())
    assert kept(run("wan", data__clip__frames=81)) > 1.5 * kept(run("wan", data__clip__frames=49))
    assert kept(run(), gradient_checkpointing=True) < kept(run()) / 5


def test_layer_sync_holds_five_copies_of_a_blocks_tokens_in_fp32() -> None:
    def kept(**changes: Any) -> int:
        return predicted(run(**changes), micro_batch_size=2).train.activations

    sync = {"techniques__layerSync": {"studentBlock": 8, "teacherBlock": 16}}
    assert kept(**sync) - kept() == 2 * (64 * 64) * 3072 * 5 * 4


def test_a_few_step_generator_has_a_second_time_embedder_and_keeps_weights_aside_for_its_teacher() -> None:
    ema = {"hyperparameters__ema": {}}
    plain = predicted(run(**ema)).train
    twin = predicted(run(**ema, objective__twinFlow={})).train
    width = 3072  # flux's: two layers from 256 waves, and a vector for negative times
    embedder = (256 + 1) * width + (width + 1) * width + width
    more = twin.trained_weights - plain.trained_weights
    assert more == 4 * embedder
    assert twin.gradients - plain.gradients == more
    assert twin.optimizer - plain.optimizer == 2 * more
    assert twin.ema == 2 * twin.trained_weights


def test_a_time_embedder_of_several_vectors_is_as_much_larger_in_a_few_step_generator() -> None:
    ema = {"hyperparameters__ema": {}}
    plain = predicted(run("ace_step", **ema)).train
    twin = predicted(run("ace_step", **ema, objective__twinFlow={})).train
    width = 2048  # from 256 waves, then to one vector and on to six, and a vector for negative times for each
    embedder = (256 + 1) * width + (width + 1) * width + (width + 1) * 6 * width + 7 * width
    assert twin.trained_weights - plain.trained_weights == 4 * embedder


def test_sounds_are_counted_by_their_seconds_whatever_pixels_there_would_be() -> None:
    half, whole = (run("ace_step", data__audio__maxSeconds=seconds) for seconds in (60, 120))
    facts = table_facts(whole.spec.model)
    tokens = 120 * 25 // 2
    assert facts.family.latent_tokens(1, 1, 120 * 48_000) == tokens
    kept = [predicted(each).train.activations for each in (half, whole)]
    assert kept[1] / kept[0] == pytest.approx((tokens + facts.text_tokens) / (tokens / 2 + facts.text_tokens))
    assert predicted(whole).encode - predicted(half).encode == 60 * 48_000 * VALUES_PER_SAMPLE * 2


def test_a_sound_that_is_drawn_is_paid_for_by_its_own_seconds() -> None:
    def drawn(**length: int) -> int:
        return predicted(run("ace_step", validation={"prompts": [{"text": "a waltz"}], **length})).sample

    assert drawn() == drawn(seconds=60)  # as long as those that are trained on
    assert drawn(seconds=90) - drawn() == 30 * 48_000 * VALUES_PER_SAMPLE * 2


def test_references_are_paid_for_like_the_target() -> None:
    alone, pairs = predicted(run(model__flavour="dev")), predicted(run("flux_kontext"))
    edge = FAMILIES["flux"].latent_tokens(1024, 1024)
    text = table_facts(run().spec.model).text_tokens
    assert pairs.train.activations == pytest.approx(alone.train.activations * (2 * edge + text) / (edge + text))
    half = predicted(run("flux_kontext", data__resolution=512))
    assert half.train.activations == pytest.approx(alone.train.activations * (edge / 2 + text) / (edge + text))


def test_references_of_a_fixed_size_do_not_shrink_with_the_target() -> None:
    pairs = run("flux_kontext", data__resolution=512)
    facts = table_facts(pairs.spec.model)
    fixed = replace(facts, family=replace(facts.family, reference_edge=1024))
    scaled = predicted(pairs, facts).train.activations
    tokens = facts.family.latent_tokens(512, 512)
    expected = (5 * tokens + facts.text_tokens) / (2 * tokens + facts.text_tokens)
    assert predicted(pairs, fixed).train.activations == pytest.approx(scaled * expected)
    assert predicted(pairs, fixed).encode > predicted(pairs, facts).encode


def test_a_sample_drawn_from_a_reference_needs_more() -> None:
    pairs = run("flux_kontext", validation={"prompts": [{"text": "make it red", "references": ["a.png"]}]})
    bare = pairs.spec.validation.model_copy(
        update={"prompts": run(validation={"prompts": [{"text": "a"}]}).spec.validation.prompts}
    )
    alone = pairs.model_copy(update={"spec": pairs.spec.model_copy(update={"validation": bare})})
    # So much that denoising needs more than decoding.
    facts = replace(table_facts(pairs.spec.model), activation_bytes_per_token=10**6)
    more = predicted(pairs, facts).sample - predicted(alone, facts).sample
    assert more == 2 * facts.family.latent_tokens(1024, 1024) * 10**6


def test_a_sample_whose_size_follows_its_reference_is_not_smaller_in_a_run_of_small_targets() -> None:
    prompts = [{"text": "make it red", "references": ["a.png"]}]
    pairs = run("flux_kontext", data__resolution=512, validation={"prompts": prompts})
    # So much that denoising needs more than decoding.
    facts = replace(table_facts(pairs.spec.model), activation_bytes_per_token=10**6)
    fixed = replace(facts, family=replace(facts.family, sample_edge=1024))
    more = predicted(pairs, fixed).sample - predicted(pairs, facts).sample
    whole, small = (facts.family.latent_tokens(edge, edge) for edge in (1024, 512))
    assert more == 2 * 2 * (whole - small) * 10**6
    assert predicted(pairs, fixed).train == predicted(pairs, facts).train


def test_samples_load_the_encoders_beside_the_training_state() -> None:
    quiet, drawn = run("wan"), run("wan", validation={"prompts": [{"text": "a cat"}]})
    assert predicted(quiet).sample == 0
    model = table_facts(drawn.spec.model)
    prediction = predicted(drawn, gradient_checkpointing=True)
    assert prediction.sample > prediction.train.total - prediction.train.activations + 2 * model.encoder_parameters
    assert prediction.phase == "sample"
    assert prediction.peak == prediction.sample


def test_a_model_smaller_than_its_encoders_peaks_while_they_encode() -> None:
    prediction = predicted(run("wan", data__resolution=256, data__clip__frames=1), gradient_checkpointing=True)
    assert prediction.phase == "encode"
    assert prediction.peak > 2 * table_facts(run("wan").spec.model).encoder_parameters


def test_the_flavour_that_is_named_is_planned_with_and_else_the_first() -> None:
    assert table_facts(run().spec.model).origin == "flux dev"
    assert table_facts(run(model__flavour="schnell").spec.model).text_tokens == 256
