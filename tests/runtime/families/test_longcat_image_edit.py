"""LongCat-Image-Edit: text that begins with the picture's tokens, pictures that count on from its end, one size for both pictures."""

from collections.abc import Callable
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock

from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny
from tiny_data import picture

FAMILY = get_family("longcat_image_edit")
CPU = torch.device("cpu")
KEPT = 512  # tokens of caption and padding
AROUND = 2  # before and after the picture's


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("longcat_image_edit")


def given_to(case: Case, action: Callable[[], Any]) -> list[dict[str, Any]]:
    """What the network is given in the course of an action."""
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    action()
    handle.remove()
    return seen


@pytest.mark.parametrize("size", [(1024, 1024), (640, 480), (480, 640), (3000, 1000), (90, 700), (1001, 997)], ids=str)
def test_at_1024_the_reference_has_the_size_that_the_pipeline_chooses(size: tuple[int, int]) -> None:
    assert FAMILY.reference_size(*size, 1024) == unwrap(stock.calculate_dimensions)(1024 * 1024, size[0] / size[1])


def test_at_other_resolutions_the_reference_is_scaled_with_the_target() -> None:
    assert FAMILY.reference_size(640, 480, 512) == (592, 448)
    assert FAMILY.facts.reference_resolution(512) == 512


@torch.no_grad()
def test_text_is_the_pictures_tokens_and_exactly_512_of_the_caption_whatever_its_length(case: Case) -> None:
    shown, wide = case.references(0), (picture(300, 90),)
    for prompt in PROMPTS:
        lengths = [len(FAMILY.encode_instructions(case.pipe, [prompt], [each])[0]["embeds"]) for each in (shown, wide)]
        # Half of 80 x 64 pixels and of 128 x 48, of which the processor makes 84 x 56 and 112 x 56.
        assert lengths == [KEPT + AROUND + 6, KEPT + AROUND + 8]


@torch.no_grad()
def test_text_and_positions_are_those_of_the_pipeline(case: Case) -> None:
    """Both pictures start where the text ends, not at 512, each in a plane of its own."""
    arguments = FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=1))
    [theirs] = given_to(case, lambda: case.pipe(**arguments, output_type="latent"))
    noisy = case.latents(1)
    conditions = case.conditions(PROMPTS[:1])
    [ours] = given_to(
        case, lambda: FAMILY.predict(case.pipe.transformer, noisy, theirs["timestep"].clone(), conditions)
    )
    for name in ("encoder_hidden_states", "timestep"):
        assert torch.equal(ours[name], theirs[name])
    for name in ("txt_ids", "img_ids"):
        assert torch.equal(ours[name].double(), theirs[name].double())
    tokens, length = noisy[0, 0].numel() // 4, ours["encoder_hidden_states"].shape[1]
    torch.testing.assert_close(ours["hidden_states"][:, tokens:], theirs["hidden_states"][:, tokens:])
    assert ours["img_ids"][[0, tokens]].tolist() == [[1, length, length], [2, length, length]]
    assert length > KEPT


@torch.no_grad()
def test_the_reference_has_the_time_of_the_target(case: Case) -> None:
    """Not time 0, as the incumbent trains it: the stock pipeline has one time for all tokens."""
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    calls = given_to(case, lambda: FAMILY.predict(case.pipe.transformer, noisy, time, conditions))
    assert torch.equal(torch.cat([call["timestep"] for call in calls]), time)
    tokens = sum(each[0, 0].numel() // 4 for each in (noisy, *conditions.references))
    assert [call["hidden_states"].shape[1] for call in calls] == [tokens, tokens]


@torch.no_grad()
def test_references_that_the_encoder_sees_in_unequal_sizes_are_trained_on_together(case: Case) -> None:
    """No mask could hide padding from the network, so it must not be given any."""
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    pictures = [(picture(300, 90),), case.references(1)]
    features = FAMILY.encode_instructions(case.pipe, PROMPTS, pictures)
    assert len({len(each["embeds"]) for each in features}) == 2
    shared = case.conditions(PROMPTS)
    together = replace(shared, text=FAMILY.collate_text(features))
    calls = given_to(case, lambda: FAMILY.predict(case.pipe.transformer, noisy, time, together))
    assert [call["encoder_hidden_states"].shape[:2] for call in calls] == [
        (1, len(each["embeds"])) for each in features
    ]
    both = FAMILY.predict(case.pipe.transformer, noisy, time, together)
    for one in (0, 1):
        alone = replace(
            shared,
            text=FAMILY.collate_text([features[one]]),
            references=tuple(each[one : one + 1] for each in shared.references),
        )
        expected = FAMILY.predict(case.pipe.transformer, noisy[one : one + 1], time[one : one + 1], alone)
        torch.testing.assert_close(both[one : one + 1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_stands_in_quotes_is_tokenised_letter_by_letter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(case.pipe.tokenizer("image").input_ids) == 1
    [by_letters] = FAMILY.encode_instructions(case.pipe, ["'image'"], [case.references(0)])
    monkeypatch.setattr(stock, "split_quotation", lambda prompt: [(prompt, False)])
    [by_words] = FAMILY.encode_instructions(case.pipe, ["'image'"], [case.references(0)])
    assert not torch.allclose(by_letters["embeds"], by_words["embeds"], atol=1e-3)


@pytest.mark.parametrize("prompt", ["z" * 2000, "a '" + "image " * 300 + "'", "狐" * 600], ids=["word", "quote", "han"])
@torch.no_grad()
def test_a_long_caption_is_cut_before_the_pipeline_fails_on_it(case: Case, prompt: str) -> None:
    [shown] = case.references(0)
    with pytest.raises(TypeError):
        case.pipe.encode_prompt(prompt, image=shown)
    [features] = FAMILY.encode_instructions(case.pipe, [prompt], [[shown]])
    assert len(features["embeds"]) == KEPT + AROUND + 6
    arguments = FAMILY.sampling_arguments(case.pipe, replace(case.request(None), prompt=prompt, negative=prompt))
    assert prompt.startswith(arguments["prompt"])
    assert arguments["prompt"] == arguments["negative_prompt"]
    encoded, mask = case.pipe.encode_prompt(arguments["prompt"], image=shown), features["mask"]
    assert mask.all()
    assert encoded[0].shape[1] > KEPT
    assert len(arguments["prompt"]) > 150


def test_samples_are_asked_for_in_no_size(case: Case) -> None:
    arguments = FAMILY.sampling_arguments(case.pipe, replace(case.request(3.0), negative="blurry"))
    assert not {"width", "height"} & set(arguments)
    assert (arguments["guidance_scale"], arguments["negative_prompt"]) == (3.0, "blurry")
    assert arguments["image"] is not None


def test_text_without_its_picture_is_refused(case: Case) -> None:
    with pytest.raises(NotImplementedError, match="beside a picture"):
        FAMILY.encode_text(case.pipe, PROMPTS)


@torch.no_grad()
def test_a_checkpoint_is_loaded_without_torchvision_with_its_own_processor(case: Case, tmp_path: Path) -> None:
    folder = save_tiny("longcat_image_edit", tmp_path)
    pipe = components.load_encoders(FAMILY, folder, torch.float32, CPU)
    assert pipe.image_processor_vl.size["longest_edge"] == 28 * 28 * 12
    ours, theirs = (FAMILY.encode_instructions(each, PROMPTS[:1], [case.references(0)]) for each in (pipe, case.pipe))
    torch.testing.assert_close(ours[0]["embeds"], theirs[0]["embeds"])


@torch.no_grad()
def test_the_stock_transformer_reads_an_exported_lora(case: Case, tmp_path: Path) -> None:
    result = trained("longcat_image_edit", tmp_path, {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]})
    export_lora(result.weights, result.file, FAMILY, tmp_path / "out", provenance=PROVENANCE)
    transformer = make_case("longcat_image_edit").pipe.transformer
    transformer.load_lora_adapter(
        str(tmp_path / "out" / "diffusers"), weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    noisy, time, _ = case.noised(case.latents(1), [0.5])
    conditions = case.conditions(PROMPTS[:1])
    ours, theirs, base = (
        FAMILY.predict(model, noisy, time, conditions)
        for model in (result.denoisers["transformer"], transformer, case.pipe.transformer)
    )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (base - ours).abs().max() > 1e-3
