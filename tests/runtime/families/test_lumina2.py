"""Lumina-Image 2.0: an instruction before captions and not before negative prompts, and masks that hide the padding."""

from collections.abc import Callable
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

FAMILY = get_family("lumina2")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("lumina2")


def texts_of(case: Case, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[str]:
    """What the tokenizer is given by the pipeline while `run` runs."""
    texts: list[str] = []
    original = case.pipe._get_gemma_prompt_embeds

    def spy(prompt: str | list[str], *args: Any, **kwargs: Any) -> Any:
        texts.extend([prompt] if isinstance(prompt, str) else prompt)
        return original(prompt, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(case.pipe, "_get_gemma_prompt_embeds", spy)
        run()
    return texts


@torch.no_grad()
def test_a_caption_follows_the_instruction_and_the_empty_one_stands_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = texts_of(case, monkeypatch, lambda: FAMILY.encode_text(case.pipe, [PROMPTS[0], ""]))
    arguments = FAMILY.sampling_arguments(case.pipe, case.request(3.0, steps=1))
    theirs = texts_of(case, monkeypatch, lambda: case.pipe(**arguments, output_type="latent"))
    assert ours == theirs
    assert ours[0].startswith("You are an assistant designed to generate superior images")
    assert ours[0].endswith(" <Prompt Start> a fox")
    assert ours[1] == ""


@torch.no_grad()
def test_text_has_its_true_length_and_256_tokens_at_most(case: Case) -> None:
    short, longer, longest, empty = FAMILY.encode_text(case.pipe, ["a", "abcd", "a" * 1000, ""])
    assert len(longer["embeds"]) - len(short["embeds"]) == 3
    assert len(short["embeds"]) < 256
    assert len(longest["embeds"]) == 256
    assert len(empty["embeds"]) == empty["mask"].sum() > 0


@torch.no_grad()
def test_text_is_the_second_last_hidden_state(case: Case) -> None:
    (features,) = FAMILY.encode_text(case.pipe, PROMPTS[:1])
    text = f"{case.pipe.system_prompt} <Prompt Start> {PROMPTS[0]}"
    tokens = case.pipe.tokenizer(text, return_tensors="pt")
    hidden = case.pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features["embeds"], hidden[-2][0])
    assert not torch.allclose(features["embeds"], hidden[-1][0], atol=1e-3)


@torch.no_grad()
def test_the_padding_does_not_count(case: Case) -> None:
    embeds, mask, _, _ = case.pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert embeds.shape[1] == 256
    conditions = case.conditions(PROMPTS)
    assert conditions.text["embeds"].shape[1] < 256
    padded = replace(conditions, text={"embeds": embeds, "mask": mask})
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    torch.testing.assert_close(
        FAMILY.predict(case.pipe.transformer, noisy, time, conditions),
        FAMILY.predict(case.pipe.transformer, noisy, time, padded),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_a_negative_prompt_changes_the_picture(case: Case) -> None:
    def sample(negative: str | None) -> torch.Tensor:
        request = replace(case.request(3.0, steps=1), negative=negative)
        return case.pipe(**FAMILY.sampling_arguments(case.pipe, request), output_type="latent").images

    assert torch.equal(sample(None), sample(""))
    assert not torch.equal(sample(None), sample("fog"))


def test_the_shift_is_that_of_the_checkpoint(case: Case) -> None:
    config = dict(case.pipe.scheduler.config)
    assert resolve_shift("auto", config | {"shift": 3.0}, FAMILY.facts.shift) == ConstantShift(3.0)
    assert resolve_shift("auto", {}, FAMILY.facts.shift) == ConstantShift(6.0)


@torch.no_grad()
def test_a_lora_is_loaded_by_the_stock_pipeline(tmp_path: Path) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
    result = trained("lumina2", tmp_path, adapter, publish={"formats": ["diffusers"]})
    (file,) = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("lumina2")
    base = draw(pipe, result.arguments)
    pipe.load_lora_weights(file.path.parent, weight_name=file.path.name)
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
