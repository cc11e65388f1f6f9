"""Qwen-Image-Edit: references twice, for the text encoder and as tokens, each in the pipelines' own size; how pictures are read."""

import json
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.data import build_dataset
from atelier_runtime.families import get_family
from atelier_runtime.families.qwen_image_edit import QwenImageEdit
from atelier_runtime.family_parts.vision_language import PictureReader
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, RESOLUTION, Case, make_case, record, sampling_arguments, walk
from family_models import save_tiny
from family_models.qwen_image_edit import tiny
from tiny_data import OneRank, all_samples, no_report, picture, training_run_file, write_pictures

FAMILY = get_family("qwen_image_edit")
CPU = torch.device("cpu")
KINDS = ("qwen_image_edit", "qwen_image_edit_2511")
SIZES = [(1024, 1024), (640, 480), (480, 640), (3000, 1000), (90, 700), (1001, 997)]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def calls(case: Case, conditions: Any = None) -> dict[str, Any]:
    """What the network is given for two real samples."""
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    FAMILY.predict(case.pipe.transformer, noisy, time, conditions or case.conditions(PROMPTS))
    handle.remove()
    [call] = seen
    return call


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_reference_has_the_size_that_the_pipelines_give_it_whatever_the_resolution_of_the_run(
    size: tuple[int, int],
) -> None:
    for pipelines in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        chosen = unwrap(pipelines.calculate_dimensions)(1024 * 1024, size[0] / size[1])
        assert FAMILY.reference_size(*size, 1024) == tuple(chosen[:2])
    assert FAMILY.facts.reference_resolution(512) == FAMILY.facts.reference_resolution(1328) == 1024


@torch.no_grad()
def test_instructions_are_what_the_pipeline_encodes_of_prompt_and_pictures_when_it_samples(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    stock = case.pipe.encode_prompt

    def spy(**arguments: Any) -> Any:
        encoded.append(stock(**arguments))
        return encoded[-1]

    monkeypatch.setattr(case.pipe, "encode_prompt", spy)
    case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(None, steps=1)), output_type="latent")
    monkeypatch.undo()
    [(embeds, mask)] = encoded
    [ours] = FAMILY.encode_instructions(case.pipe, PROMPTS[:1], [case.references(0)])
    assert mask is None
    assert ours["mask"].all()
    assert torch.equal(ours["embeds"], embeds[0])


@torch.no_grad()
def test_64_tokens_are_dropped_and_those_of_the_pictures_stay_in_the_text(case: Case) -> None:
    template, pipe = case.pipe.prompt_template_encode, case.pipe
    assert template.startswith("<|im_start|>system\nDescribe the key features of the input image")
    [features] = FAMILY.encode_instructions(pipe, ["a fox"], [case.references(0)])
    named = (
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|><|image_pad|><|vision_end|>"
    )
    text = template.format("a fox" if case.name == "qwen_image_edit" else f"{named}a fox")
    before, _, _ = text.partition("<|vision_start|>")
    assert len(pipe.tokenizer(before).input_ids) >= 64
    # Of each picture, in these sizes 56 x 56 pixels, 4 tokens stand where the template has one.
    assert len(features["embeds"]) == len(pipe.tokenizer(text).input_ids) + 3 * case.tiny.references - 64
    assert len(features["mask"]) == len(features["embeds"])


@torch.no_grad()
def test_a_long_caption_is_not_cut(case: Case) -> None:
    [features] = FAMILY.encode_instructions(case.pipe, ["z" * 1500], [case.references(0)])
    assert len(features["embeds"]) > 1500
    assert "max_sequence_length" not in FAMILY.sampling_arguments(case.pipe, case.request(None))


def test_text_without_its_pictures_is_refused(case: Case) -> None:
    with pytest.raises(NotImplementedError, match="beside pictures"):
        FAMILY.encode_text(case.pipe, PROMPTS)


@torch.no_grad()
def test_references_follow_the_target_as_clean_tokens_in_a_plane_of_their_own_at_its_time(case: Case) -> None:
    conditions = case.conditions(PROMPTS)
    call = calls(case, conditions)
    grids = [(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in conditions.references]
    assert grids == [(1, 4, 4), (1, 2, 6)][: case.tiny.references]
    assert call["img_shapes"] == [[(1, 2, 4), *grids]] * 2
    assert call["timestep"].tolist() == pytest.approx([0.3, 0.9])
    clean = type(case.pipe)._pack_latents(conditions.references[0].contiguous(), 2, 16, 8, 8)
    assert torch.equal(call["hidden_states"][:, 8 : 8 + 16], clean)


@torch.no_grad()
def test_only_the_network_of_2511_gives_references_time_0(case: Case) -> None:
    """The incumbent gives it to references of families whose pipelines have one time for all tokens."""
    shifts: list[torch.Tensor] = []
    block = case.pipe.transformer.transformer_blocks[0]
    handle = block.img_mod.register_forward_hook(lambda _module, _args, output: shifts.append(output))
    calls(case)
    handle.remove()
    times = {"qwen_image_edit_2511": 4}.get(case.name, 2)
    assert [len(each) for each in shifts] == [times]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@torch.no_grad()
def test_2509_which_gives_references_the_time_of_the_target_is_sampled_step_by_step_too(guided: bool) -> None:
    pipe = tiny(QwenImageEditPlusPipeline)
    assert not pipe.transformer.config.zero_cond_t
    case = Case("qwen_image_edit_2511", pipe, FAMILY)
    recording = record(pipe, sampling_arguments(case, guided=guided))
    for ours, theirs in walk(case, recording, guided=guided):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_of_a_batch_does_not_leak_into_the_picture(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    expected = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    embeds, mask = conditions.text["embeds"], conditions.text["mask"]
    assert not mask.all()
    other = replace(conditions, text={"embeds": torch.where(mask[..., None], embeds, 7.0), "mask": mask})
    torch.testing.assert_close(FAMILY.predict(case.pipe.transformer, noisy, time, other), expected)


@torch.no_grad()
def test_the_first_checkpoint_refuses_more_than_one_reference() -> None:
    case = make_case("qwen_image_edit")
    two = (*case.references(0), *case.references(1))
    with pytest.raises(ConfigError, match=r"2 references are given .* is a QwenImageEditPipeline, which takes one"):
        FAMILY.encode_instructions(case.pipe, ["a fox"], [two])
    with pytest.raises(ConfigError, match=r"spec\.data\.sources and spec\.validation\.prompts"):
        FAMILY.sampling_arguments(case.pipe, replace(case.request(None), references=two))


@pytest.mark.parametrize(
    ("guidance", "negative", "expected"),
    [
        (3.0, None, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
        (None, "blurry", {"negative_prompt": "blurry"}),
        (None, None, {}),
    ],
    ids=["guided", "negative alone", "plain"],
)
def test_guidance_is_true_guidance_and_has_something_to_contrast_with(
    case: Case, guidance: float | None, negative: str | None, expected: dict[str, Any]
) -> None:
    arguments = FAMILY.sampling_arguments(case.pipe, replace(case.request(guidance), negative=negative))
    keys = {"guidance_scale", "true_cfg_scale", "negative_prompt"}
    assert {key: value for key, value in arguments.items() if key in keys} == expected


def test_a_checkpoint_is_loaded_without_torchvision_and_with_its_own_limits_of_pictures(
    case: Case, tmp_path: Path
) -> None:
    folder = save_tiny(case.name, tmp_path)
    assert json.loads((folder / "model_index.json").read_text())["processor"] == ["transformers", "Qwen2VLProcessor"]
    with pytest.raises(OSError, match="video processor"):
        Qwen2VLProcessor.from_pretrained(folder / "processor")
    pipe = components.load_encoders(FAMILY, folder, torch.float32, CPU)
    assert type(pipe) is type(case.pipe)
    limits = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}
    assert {name: pipe.processor.image_processor.size[name] for name in limits} == limits
    ours, theirs = (FAMILY.encode_instructions(each, PROMPTS[:1], [case.references(0)]) for each in (pipe, case.pipe))
    torch.testing.assert_close(ours[0]["embeds"], theirs[0]["embeds"])


def test_limits_are_read_as_published_checkpoints_write_them(tmp_path: Path) -> None:
    folder = save_tiny("qwen_image_edit", tmp_path) / "processor"
    (folder / "processor_config.json").unlink()
    published = {"image_processor_type": "Qwen2VLImageProcessorFast", "min_pixels": 3136, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    read = PictureReader.of(folder).image_processor([Image.new("RGB", (1024, 1024))])
    assert read["image_grid_thw"].tolist() == [[1, 74, 74]]  # 1036 pixels: transformers' own limit would make it fewer


def test_a_checkpoint_without_its_processor_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("qwen_image_edit", tmp_path)
    (folder / "processor" / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot be loaded .*spec\.model\.source"):
        components.load_encoders(FAMILY, folder, torch.float32, CPU)


@pytest.mark.parametrize("stock", [Qwen2VLProcessor, Qwen2_5_VLProcessor], ids=lambda stock: stock.__name__)
def test_the_processor_gives_what_that_of_transformers_gives(stock: Any) -> None:
    ours = make_case("qwen_image_edit").pipe.processor
    theirs = stock.__new__(stock)  # its constructor wants a processor of clips
    for name in ("image_processor", "tokenizer", "image_token", "image_token_id", "chat_template"):
        setattr(theirs, name, getattr(ours, name))
    text = ["a<|vision_start|><|image_pad|><|vision_end|>b", "<|image_pad|>"]
    pictures = [picture(70, 48), picture(500, 60, seed=1)]
    made = [each(text=text, images=pictures, padding=True, return_tensors="pt") for each in (ours, theirs)]
    assert made[0].keys() == made[1].keys() >= {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
    for name in made[0]:
        assert torch.equal(made[0][name], made[1][name])


def test_the_processor_cuts_a_picture_into_patches_of_which_four_are_a_token() -> None:
    reader = make_case("qwen_image_edit").pipe.processor
    shown = picture(70, 48)
    made = reader(text=["a<|image_pad|>"], images=[shown], return_tensors="pt")
    height, width = smart_resize(48, 70, min_pixels=56 * 56, max_pixels=28 * 28 * 12)
    assert made["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    pads = (made["input_ids"] == reader.image_token_id).sum()
    assert pads == height * width // 28**2
    resized = np.asarray(shown.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    first = ((resized - mean) / std)[:14, :14].transpose(2, 0, 1)
    # Color, two equal frames, rows, columns.
    patch = made["pixel_values"][0].reshape(3, 2, 14, 14).numpy()
    np.testing.assert_allclose(patch[:, 0], first, atol=1e-5)
    np.testing.assert_array_equal(patch[:, 0], patch[:, 1])


class Small(QwenImageEdit):
    """The family with references as small as the tiny pipelines have them."""

    @property
    def facts(self) -> FamilyFacts:
        return replace(super().facts, reference_edge=RESOLUTION)


@torch.no_grad()
def test_a_data_set_of_pairs_holds_what_the_pipeline_makes_of_each_pair(tmp_path: Path) -> None:
    case = make_case("qwen_image_edit_2511")
    base = save_tiny(case.name, tmp_path / "base")
    write_pictures(tmp_path / "targets", [(40, 40)] * 2, caption="join them")
    shown = [picture(70, 48, seed=1), picture(70, 48, seed=2), picture(80, 40, seed=3)]
    for folder, pictures in (("a", shown[:2]), ("b", shown[2:] * 2)):
        (tmp_path / folder).mkdir()
        for number, each in enumerate(pictures):
            each.save(tmp_path / folder / f"{number:03d}.png")
    sources = [{"uri": str(tmp_path / "targets"), "references": [str(tmp_path / "a"), str(tmp_path / "b")]}]
    data = {"sources": sources, "captions": {"dropout": 0}}
    run = training_run_file(tmp_path, [], base, family="qwen_image_edit", data=data)
    samples = all_samples(build_dataset(run, Small(), OneRank(), no_report))
    for number, name in enumerate(("000.png", "001.png")):
        pair = (shown[number], shown[2])
        [text] = FAMILY.encode_instructions(case.pipe, [f"join them {number}"], [pair])
        torch.testing.assert_close(samples[name].text[0]["embeds"], text["embeds"], atol=1e-5, rtol=1e-5)
        theirs = []
        for each, size in zip(pair, ((64, 64), (96, 32)), strict=True):
            pixels = case.pipe.image_processor.preprocess(each, size[1], size[0]).unsqueeze(2)
            theirs.append(case.pipe._encode_vae_image(pixels, None).squeeze(2))
        for ours, expected in zip(samples[name].references, theirs, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_stock_pipeline_reads_the_kohya_layout(tmp_path: Path) -> None:
    case = make_case("qwen_image_edit")
    result = trained("qwen_image_edit", tmp_path, {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]})
    export_lora(result.weights, result.file, FAMILY, tmp_path / "out", provenance=PROVENANCE)
    pipe = make_case("qwen_image_edit").pipe
    pipe.load_lora_weights(str(tmp_path / "out" / "kohya"), weight_name="fox.safetensors")
    noisy, time, _ = case.noised(case.latents(1), [0.5])
    conditions = case.conditions(PROMPTS[:1])
    ours, theirs, base = (
        FAMILY.predict(model, noisy, time, conditions)
        for model in (result.denoisers["transformer"], pipe.transformer, case.pipe.transformer)
    )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (base - ours).abs().max() > 1e-3
