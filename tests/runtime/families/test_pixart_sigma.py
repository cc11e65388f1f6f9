"""PixArt Sigma: what the pipeline makes of the caption and of the output, the legacy config, and LoRA files without a loader."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_api.families import FAMILIES
from atelier_api.model_files import lora_loading
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import save_tiny, tiny_pipeline
from stock_loader import draw

FAMILY = get_family("pixart_sigma")
LORA = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("pixart_sigma")


@torch.no_grad()
def test_captions_are_cleaned_and_at_most_300_tokens_as_when_sampling(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    original = case.pipe._text_preprocessing
    lengths: list[int] = []
    tokenizer = case.pipe.tokenizer

    def clean(text: Any, clean_caption: bool = False) -> Any:
        calls.append({"text": text, "clean_caption": clean_caption})
        return original(text, clean_caption=clean_caption)

    def tokenize(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs.get("max_length", 0))
        return tokenizer(*args, **kwargs)

    monkeypatch.setattr(case.pipe, "_text_preprocessing", clean)
    monkeypatch.setattr(case.pipe, "tokenizer", tokenize)
    FAMILY.encode_text(case.pipe, [PROMPTS[0]])
    ours, our_lengths = list(calls), list(lengths)
    calls.clear(), lengths.clear()
    case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=1)), output_type="latent")
    assert ours == [{"text": [PROMPTS[0]], "clean_caption": True}]
    assert [call["clean_caption"] for call in calls] == [True]
    assert our_lengths == lengths
    assert max(lengths) == 300


@torch.no_grad()
def test_text_is_stored_at_its_true_length_and_the_padding_does_not_count(case: Case) -> None:
    features = FAMILY.encode_text(case.pipe, list(PROMPTS))
    assert len(features[0]["embeds"]) < len(features[1]["embeds"]) < 300
    embeds, mask, _, _ = case.pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert embeds.shape[1] == 300
    conditions = case.conditions(PROMPTS)
    padded = replace(conditions, text={"embeds": embeds, "mask": mask})
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    torch.testing.assert_close(
        FAMILY.predict(case.pipe.transformer, noisy, time, conditions),
        FAMILY.predict(case.pipe.transformer, noisy, time, padded),
        atol=1e-5,
        rtol=1e-5,
    )


def test_the_variance_that_the_pipeline_drops_is_not_trained(case: Case) -> None:
    denoiser = tiny_pipeline("pixart_sigma").transformer
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    FAMILY.predict(denoiser, noisy, time, case.conditions(PROMPTS[:1])).square().sum().backward()
    # The rows of the last layer are (row, column, channel) of a patch; channels 4 to 7 are the variance.
    gradient = denoiser.proj_out.weight.grad.unflatten(0, (4, 8))
    assert gradient[:, :4].any(dim=-1).all()
    assert not gradient[:, 4:].any()


def test_a_picture_is_drawn_in_the_size_that_was_asked_for(case: Case) -> None:
    output = case.pipe(**FAMILY.sampling_arguments(case.pipe, case.request(1.0, steps=1)), output_type="np")
    assert output.images.shape == (1, 32, 64, 3)


def test_a_checkpoint_of_the_legacy_class_is_loaded_as_the_same_transformer(case: Case, tmp_path: Path) -> None:
    """The published configs name `Transformer2DModel`, in which this network began."""
    save_tiny("pixart_sigma", tmp_path)
    for file, key, value in (
        ("model_index.json", "transformer", ["diffusers", "Transformer2DModel"]),
        ("transformer/config.json", "_class_name", "Transformer2DModel"),
    ):
        config = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(config | {key: value}))
    denoiser = components.load_denoiser(tmp_path, "transformer", torch.float32, torch.device("cpu"))
    assert type(denoiser) is type(case.pipe.transformer)
    for name, tensor in case.pipe.transformer.state_dict().items():
        assert torch.equal(denoiser.state_dict()[name], tensor)


@torch.no_grad()
def test_an_exported_lora_draws_what_the_training_side_draws_loaded_as_the_report_says(tmp_path: Path) -> None:
    result = trained("pixart_sigma", tmp_path, LORA, publish={"formats": ["diffusers"]})
    files = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("pixart_sigma")
    base = draw(pipe, result.arguments)
    lines = lora_loading(FAMILIES["pixart_sigma"], str(files[0].path.parent), files[0].path.name)
    exec("\n".join(lines), {"pipe": pipe})
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
