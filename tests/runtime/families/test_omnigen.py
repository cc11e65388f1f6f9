"""OmniGen: captions as token ids in the pipeline's template, positions and masks of a batch, its negative prompt, no torchvision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import OmniGenPipeline
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

from atelier_api.families import FAMILIES
from atelier_api.model_files import lora_loading
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.families.omnigen import attention_mask
from atelier_runtime.objectives.timesteps import ConstantShift, resolve_shift
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny, tiny_pipeline
from family_models.omnigen import INSTRUCTION, NEGATIVE
from stock_loader import draw

FAMILY = get_family("omnigen")
CPU = torch.device("cpu")


@pytest.fixture
def case() -> Case:
    return make_case("omnigen")


@torch.no_grad()
def drawn(case: Case, **changes: Any) -> dict[str, Any]:
    """What the network is given at the first step of the stock pipeline: the prompt's sample first, then the negative's."""
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    request = replace(case.request(2.0, steps=1), **changes)
    case.pipe(**FAMILY.sampling_arguments(case.pipe, request), output_type="latent")
    handle.remove()
    return seen[0]


def test_captions_stand_in_the_pipelines_template_and_are_not_cut(case: Case) -> None:
    features = FAMILY.encode_text(case.pipe, ["a fox", "z" * 3000])
    expected = f"<|user|>\n{INSTRUCTION}\na fox<|end|>\n<|assistant|>\n<|diffusion|>"
    assert features[0]["ids"].tolist() == case.pipe.tokenizer(expected).input_ids
    assert len(features[1]["ids"]) > 3000


def test_ids_and_mask_are_those_that_the_pipeline_gives_the_network(case: Case) -> None:
    for prompt in PROMPTS:
        theirs = drawn(case, prompt=prompt)
        ours = FAMILY.collate_text(FAMILY.encode_text(case.pipe, [prompt, NEGATIVE]))
        assert torch.equal(ours["ids"], theirs["input_ids"])
        assert not ours["mask"].all()
        tokens = theirs["attention_mask"].shape[-1] - ours["ids"].shape[1] - 1
        assert torch.equal(attention_mask(ours["mask"], tokens).float(), theirs["attention_mask"])


@torch.no_grad()
def test_positions_of_the_first_sample_do_not_reach_the_others(case: Case) -> None:
    """The network reads the first row alone. With the pipeline's positions the longer second caption would be another picture."""
    denoiser = case.pipe.transformer
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    mask = attention_mask(conditions.text["mask"], 8)
    stock = denoiser(
        hidden_states=noisy,
        timestep=1 - time,
        input_ids=conditions.text["ids"],
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=mask.float(),
        position_ids=processor_omnigen.OmniGenCollator().create_position(conditions.text["mask"].long(), [8, 8]),
    ).sample
    alone = -FAMILY.predict(denoiser, noisy[1:], time[1:], case.conditions(PROMPTS[1:]))
    assert (stock[1:] - alone).abs().max() > 1e-4
    ours = -FAMILY.predict(denoiser, noisy, time, conditions)
    torch.testing.assert_close(ours[1:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[:1], stock[:1], atol=1e-5, rtol=1e-5)


def test_caption_and_time_see_what_is_before_them_and_the_picture_sees_everything() -> None:
    text = torch.tensor([[False, True, True]])
    assert attention_mask(text, 2).int()[0].tolist() == [
        [1, 1, 1, 1, 1, 1],  # padding
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],  # time
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]


def test_a_negative_prompt_replaces_the_pipelines_own_for_one_picture(case: Case) -> None:
    own = drawn(case)["input_ids"][1]
    expected = FAMILY.encode_text(case.pipe, [NEGATIVE, "a blur"])
    assert own[own != 2].tolist() == expected[0]["ids"].tolist()
    for _ in range(2):
        asked = drawn(case, negative="a blur")["input_ids"][1]
        assert asked.tolist() == expected[1]["ids"].tolist()
    assert torch.equal(drawn(case)["input_ids"][1], own)


def test_the_layer_for_pictures_among_the_input_is_not_trained(case: Case) -> None:
    (expression,) = FAMILY.frozen_parameters
    assert expression.startswith(r"patch_embedding\.input_image_proj")
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(PROMPTS[:1])).square().sum().backward()
    embedding = case.pipe.transformer.patch_embedding
    assert embedding.input_image_proj.weight.grad is None
    assert embedding.output_image_proj.weight.grad.any()


def test_the_shift_is_that_of_the_checkpoint(case: Case) -> None:
    assert resolve_shift("auto", dict(case.pipe.scheduler.config), FAMILY.facts.shift) == ConstantShift(1.0)


def test_the_pipeline_is_built_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("omnigen", tmp_path)
    monkeypatch.delattr(processor_omnigen, "transforms")
    monkeypatch.delattr(pipeline_omnigen, "OmniGenMultiModalProcessor")
    with pytest.raises(NameError, match="OmniGenMultiModalProcessor"):
        OmniGenPipeline.from_pretrained(tmp_path)
    encoders = components.load_encoders(FAMILY, tmp_path, torch.float32, CPU)
    assert encoders.transformer is None
    assert len(FAMILY.encode_text(encoders, ["a fox"])[0]["ids"])


def test_a_picture_is_drawn_in_the_size_that_was_asked_for(case: Case) -> None:
    output = case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=1)), output_type="np")
    assert output.images.shape == (1, 32, 64, 3)


@torch.no_grad()
def test_an_exported_lora_draws_what_the_training_side_draws_loaded_as_the_report_says(tmp_path: Path) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
    result = trained("omnigen", tmp_path, adapter, publish={"formats": ["diffusers"]})
    files = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("omnigen")
    base = draw(pipe, result.arguments)
    exec("\n".join(lora_loading(FAMILIES["omnigen"], str(files[0].path.parent), files[0].path.name)), {"pipe": pipe})
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
