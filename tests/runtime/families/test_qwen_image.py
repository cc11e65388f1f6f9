"""Qwen-Image: its template and lengths, padding that does not count, the text stream that ends early, and true guidance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_api.v1alpha1.adapter import FullAdapter
from atelier_runtime import adapters
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import tiny_pipeline

FAMILY = get_family("qwen_image")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("qwen_image")


@torch.no_grad()
def test_captions_are_what_the_pipeline_encodes_of_each_alone_and_34_tokens_are_dropped(case: Case) -> None:
    assert "Describe the image by detailing" in case.pipe.prompt_template_encode
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    for prompt, item in zip(PROMPTS, features, strict=True):
        embeds, mask = case.pipe.encode_prompt(prompt)
        assert mask is None
        torch.testing.assert_close(item["embeds"], embeds[0])
        whole = case.pipe.tokenizer(case.pipe.prompt_template_encode.format(prompt)).input_ids
        assert len(item["embeds"]) == len(item["mask"]) == len(whole) - 34
    assert len({len(item["embeds"]) for item in features}) == 2


@torch.no_grad()
def test_a_long_caption_is_cut_at_512_tokens_and_not_at_1024_in_training_and_sampling(case: Case) -> None:
    (features,) = FAMILY.encode_text(case.pipe, ["z" * 2000])
    assert len(features["embeds"]) == 512
    assert FAMILY.sampling_arguments(case.pipe, case.request(None))["max_sequence_length"] == 512


@torch.no_grad()
def test_padding_of_a_batch_does_not_leak_into_the_picture(case: Case) -> None:
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    conditions = case.conditions(PROMPTS)
    expected = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    embeds, mask = conditions.text["embeds"], conditions.text["mask"]
    assert not mask.all()
    other = replace(conditions, text={"embeds": torch.where(mask[..., None], embeds, 7.0), "mask": mask})
    torch.testing.assert_close(FAMILY.predict(case.pipe.transformer, noisy, time, other), expected)


@pytest.mark.parametrize(("prompts", "masked"), [(PROMPTS, True), (("a fox", "a cat"), False)], ids=["padded", "even"])
@torch.no_grad()
def test_a_mask_is_given_only_where_something_is_padded(case: Case, prompts: tuple[str, str], masked: bool) -> None:
    given: list[Any] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
    )
    noisy, time, _ = case.noised(case.latents(2), (0.3, 0.9))
    FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(prompts))
    handle.remove()
    assert [mask is not None for mask in given] == [masked]


def test_what_the_last_block_makes_of_its_text_is_no_target_and_frozen() -> None:
    """DistributedDataParallel fails in its second step where a parameter that trains gets no gradient."""
    transformer = tiny_pipeline("qwen_image").transformer
    last = "transformer_blocks.1."
    found = adapters.resolve_targets(transformer, ["all"], FAMILY)
    dead = [f"{last}{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")]
    assert not set(dead) & set(found)
    assert {f"{last}attn.add_k_proj", "transformer_blocks.0.attn.to_add_out"} <= set(found)
    adapters.install(transformer, FullAdapter(type="full"), FAMILY)
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(f"{name}.{part}" for name in dead for part in ("weight", "bias"))


@pytest.mark.parametrize(
    ("guidance", "negative", "expected"),
    [
        (3.0, None, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
        (3.0, "blurry", {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}),
        (None, "blurry", {"negative_prompt": "blurry"}),
        (None, None, {}),
    ],
    ids=["guided", "guided with negative", "negative alone", "plain"],
)
def test_guidance_is_true_guidance_and_has_something_to_contrast_with(
    case: Case, guidance: float | None, negative: str | None, expected: dict[str, Any]
) -> None:
    arguments = FAMILY.sampling_arguments(case.pipe, replace(case.request(guidance), negative=negative))
    keys = {"guidance_scale", "true_cfg_scale", "negative_prompt"}
    assert {key: value for key, value in arguments.items() if key in keys} == expected


@torch.no_grad()
def test_the_stock_pipeline_reads_the_kohya_layout(case: Case, tmp_path: Path) -> None:
    result = trained("qwen_image", tmp_path, {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]})
    export_lora(result.weights, result.file, FAMILY, tmp_path / "out", provenance=PROVENANCE)
    pipe = make_case("qwen_image").pipe
    pipe.load_lora_weights(str(tmp_path / "out" / "kohya"), weight_name="fox.safetensors")
    noisy, time, _ = case.noised(case.latents(1), [0.5])
    conditions = case.conditions(PROMPTS[:1])
    ours, theirs, base = (
        FAMILY.predict(model, noisy, time, conditions)
        for model in (result.denoisers["transformer"], pipe.transformer, case.pipe.transformer)
    )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (base - ours).abs().max() > 1e-3
