"""LongCat-Image: captions of exactly 512 tokens, quotes by letters, prompts as they are written."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image

from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny

FAMILY = get_family("longcat_image")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("longcat_image")


@torch.no_grad()
def test_a_caption_is_512_tokens_long_whatever_its_length_and_the_instruction_is_cut_off(case: Case) -> None:
    features = FAMILY.encode_text(case.pipe, [*PROMPTS, "z" * 2000])
    assert [len(item["embeds"]) for item in features] == [512, 512, 512]
    for prompt, item in zip(PROMPTS, features, strict=False):
        torch.testing.assert_close(item["embeds"], case.pipe.encode_prompt(prompt)[0][0])


@torch.no_grad()
def test_what_stands_in_quotes_is_tokenised_letter_by_letter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(case.pipe.tokenizer("image").input_ids) == 1
    (by_letters,) = FAMILY.encode_text(case.pipe, ["'image'"])
    monkeypatch.setattr(pipeline_longcat_image, "split_quotation", lambda prompt: [(prompt, False)])
    (by_words,) = FAMILY.encode_text(case.pipe, ["'image'"])
    assert not torch.allclose(by_letters["embeds"], by_words["embeds"], atol=1e-3)


@torch.no_grad()
def test_positions_are_those_of_the_pipeline(case: Case) -> None:
    given: dict[str, torch.Tensor] = {}
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    noisy, time, _ = case.noised(case.latents(1), [0.5])
    FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(PROMPTS[:1]))
    handle.remove()
    _, text = case.pipe.encode_prompt(PROMPTS[0])
    size = (case.tiny.height, case.tiny.width)
    _, picture = case.pipe.prepare_latents(1, 16, *size, torch.float32, torch.device("cpu"), None, noisy)
    assert torch.equal(given["txt_ids"].float(), text)
    assert torch.equal(given["img_ids"].float(), picture)
    assert given["img_ids"][0].tolist() == [1, 512, 512]


def test_prompts_are_not_rewritten_and_what_rewrites_them_is_not_loaded(tmp_path: Path) -> None:
    folder = save_tiny("longcat_image", tmp_path)
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    assert config["text_processor"] == [None, None]
    index.write_text(json.dumps(config | {"text_processor": ["transformers", "Qwen2VLProcessor"]}))
    pipe = components.load_encoders(FAMILY, folder, torch.float32, torch.device("cpu"))
    assert pipe.text_processor is None
    assert FAMILY.sampling_arguments(pipe, make_case("longcat_image").request(None))["enable_prompt_rewrite"] is False


@torch.no_grad()
def test_the_stock_transformer_reads_an_exported_lora(case: Case, tmp_path: Path) -> None:
    result = trained("longcat_image", tmp_path, {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]})
    export_lora(result.weights, result.file, FAMILY, tmp_path / "out", provenance=PROVENANCE)
    transformer = make_case("longcat_image").pipe.transformer
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
