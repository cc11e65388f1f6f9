"""Sana: its instruction before captions, latents at full scale, and recomputing that works."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.objectives.timesteps import ConstantShift, resolve_shift
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import tiny_pipeline
from stock_loader import draw

FAMILY = get_family("sana")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("sana")


@torch.no_grad()
def test_a_caption_follows_the_instruction_and_the_empty_one_stands_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    original = case.pipe._get_gemma_prompt_embeds

    def spy(**kwargs: Any) -> Any:
        texts.append("\n".join(kwargs["complex_human_instruction"] or []) + "|" + "".join(kwargs["prompt"]))
        return original(**kwargs)

    monkeypatch.setattr(case.pipe, "_get_gemma_prompt_embeds", spy)
    FAMILY.encode_text(case.pipe, [PROMPTS[0], ""])
    ours = list(texts)
    texts.clear()
    case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(3.0, steps=1)), output_type="latent")
    assert ours == texts
    assert ours[0].startswith("Given a user prompt, generate an 'Enhanced prompt'")
    assert ours[0].endswith("User Prompt: |a fox")
    assert ours[1] == "|"


@torch.no_grad()
def test_of_the_instruction_two_tokens_are_kept_and_at_most_300_in_all(case: Case) -> None:
    short, longer, longest = FAMILY.encode_text(case.pipe, ["a", "abcd", "a" * 1000])
    tokens = [len(case.pipe.tokenizer(text, add_special_tokens=False).input_ids) for text in ("a", "abcd")]
    assert len(longer["embeds"]) - len(short["embeds"]) == tokens[1] - tokens[0]
    assert len(short["embeds"]) <= 2 + tokens[0]
    assert len(longest["embeds"]) == 300


@torch.no_grad()
def test_text_is_stored_at_its_true_length_and_the_padding_does_not_count(case: Case) -> None:
    default = inspect.signature(case.pipe.__call__).parameters["complex_human_instruction"].default
    embeds, mask, _, _ = case.pipe.encode_prompt(
        list(PROMPTS), do_classifier_free_guidance=False, complex_human_instruction=default
    )
    assert embeds.shape[1] == 300
    conditions = case.conditions(PROMPTS)
    assert conditions.text["embeds"].shape[1] < 300
    padded = replace(conditions, text={"embeds": embeds, "mask": mask})
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    torch.testing.assert_close(
        FAMILY.predict(case.pipe.transformer, noisy, time, conditions),
        FAMILY.predict(case.pipe.transformer, noisy, time, padded),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_latents_are_not_halved(case: Case) -> None:
    pixels = case.pixels(1)
    latents = FAMILY.encode_pixels(case.pipe, pixels)
    assert latents.std is None
    torch.testing.assert_close(latents.mean, case.pipe.vae.encode(pixels).latent * 0.41407)


def test_gradient_checkpointing_has_an_effect(case: Case) -> None:
    denoiser = tiny_pipeline("sana").transformer
    denoiser.enable_gradient_checkpointing()
    runs: list[int] = []
    for number, block in enumerate(denoiser.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    FAMILY.predict(denoiser, noisy, time, case.conditions(PROMPTS[:1])).square().sum().backward()
    assert runs == [0, 1, 1, 0]


@torch.no_grad()
def test_time_is_scaled_as_the_checkpoint_says(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    conditions = case.conditions(PROMPTS[:1])
    half = FAMILY.predict(case.pipe.transformer, noisy, time / 2, conditions)
    scaled = tiny_pipeline("sana").transformer
    scaled.register_to_config(timestep_scale=0.5)
    torch.testing.assert_close(FAMILY.predict(scaled, noisy, time, conditions), half)
    assert not torch.equal(FAMILY.predict(case.pipe.transformer, noisy, time, conditions), half)


def test_the_shift_is_that_of_the_checkpoint_and_not_of_a_table(case: Case) -> None:
    config = dict(case.pipe.scheduler.config) | {"flow_shift": 6.0}
    assert resolve_shift("auto", config, FAMILY.facts.shift) == ConstantShift(6.0)
    assert resolve_shift("2", config, FAMILY.facts.shift) == ConstantShift(2.0)


def test_a_picture_is_drawn_in_the_size_that_was_asked_for(case: Case) -> None:
    output = case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=1)), output_type="np")
    assert output.images.shape == (1, 32, 64, 3)


@torch.no_grad()
def test_a_lora_on_the_convolutions_is_loaded_by_the_stock_pipeline(tmp_path: Path) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["mlp"]}
    result = trained("sana", tmp_path, adapter, publish={"formats": ["diffusers"]})
    (file,) = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("sana")
    base = draw(pipe, result.arguments)
    pipe.load_lora_weights(file.path.parent, weight_name=file.path.name)
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
