"""HunyuanVideo 1.5: two encoders with lengths of their own, guidance in a guider, channels for a picture, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from atelier_api.errors import ConfigError
from atelier_runtime import components
from atelier_runtime.data.cache import Cache, ShardWriter
from atelier_runtime.families import get_family
from family_cases import PROMPTS, Case, make_case, record, sampling_arguments
from family_models.parts import seeded

FAMILY = get_family("hunyuan_video15")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("hunyuan_video15")


def calls(case: Case, prompts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Arguments of each call of the denoiser in one prediction."""
    seen: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    noisy = torch.randn(len(prompts), 32, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        FAMILY.predict(case.pipe.transformer, noisy, torch.full((len(noisy),), 0.5), case.conditions(prompts))
    handle.remove()
    return seen


@torch.no_grad()
def test_a_prompt_with_words_to_draw_is_predicted_as_the_pipeline_predicts_it(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conformance suite samples a prompt without such words, whose tokens of the second encoder are all padding."""
    steps = []
    original = case.pipe.scheduler.step

    def spy(output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, **kwargs: Any) -> Any:
        steps.append((output, t, sample))
        return original(output, t, sample, **kwargs)

    monkeypatch.setattr(case.pipe.scheduler, "step", spy)
    arguments = FAMILY.sampling_arguments(case.pipe, replace(case.request(1.0, steps=2), prompt=PROMPTS[1]))
    case.pipe(**arguments, output_type="latent")
    conditions = case.conditions(PROMPTS[1:])
    assert conditions.text["mask_2"].sum() > 0
    for output, t, sample in steps:
        prediction = FAMILY.predict(case.pipe.transformer, sample, t.expand(1) / 1000, conditions)
        torch.testing.assert_close(prediction, output, atol=1e-5, rtol=1e-5)
    without = replace(conditions, text=conditions.text | {"mask_2": torch.zeros_like(conditions.text["mask_2"])})
    output, t, sample = steps[0]
    other = FAMILY.predict(case.pipe.transformer, sample, t.expand(1) / 1000, without)
    assert not torch.allclose(other, output, atol=1e-5)


@torch.no_grad()
def test_features_are_what_the_mask_leaves_of_both_encoders(case: Case) -> None:
    embeds, mask, glyphs, glyph_mask = case.pipe.encode_prompt(list(PROMPTS), batch_size=2)
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    for row, item in enumerate(features):
        assert torch.equal(item["embeds"], embeds[row, : int(mask[row].sum())])
        assert torch.equal(item["embeds_2"], glyphs[row, : int(glyph_mask[row].sum())])
        assert item["mask"].all()
        assert item["mask_2"].all()
    assert [len(item["embeds_2"]) == 0 for item in features] == [True, False]


@torch.no_grad()
def test_the_system_message_is_cut_off_after_108_tokens(case: Case) -> None:
    messages = [{"role": "system", "content": case.pipe.system_message}, {"role": "user", "content": PROMPTS[0]}]
    whole = case.pipe.tokenizer.apply_chat_template([messages], add_generation_prompt=True, return_dict=True).input_ids[
        0
    ]
    assert len(FAMILY.encode_text(case.pipe, PROMPTS[:1])[0]["embeds"]) == len(whole) - 108


@torch.no_grad()
def test_the_cache_keeps_captions_without_words_to_draw(case: Case, tmp_path: Path) -> None:
    """Alone in a shard, and beside one that has some."""
    features = dict(zip((b"a" * 32, b"b" * 32), FAMILY.encode_text(case.pipe, PROMPTS), strict=True))
    for keys in ([b"a" * 32], list(features)):
        cache = Cache(tmp_path / str(len(keys)))
        writer = ShardWriter(cache.folder)
        for key in keys:
            writer.add(key, features[key])
        writer.commit()
        cache.refresh()
        for key in keys:
            row = cache.row(key)
            assert row is not None
            kept = cache.read(row)
            assert kept.keys() == features[key].keys()
            assert all(torch.equal(kept[name], tensor) for name, tensor in features[key].items())


def test_each_sample_is_a_call_of_its_own_without_padding(case: Case) -> None:
    """Padding would leave whole rows of attention's mask false; and all ranks must call equally often."""
    seen = calls(case, PROMPTS)
    assert len(seen) == 2
    for arguments in seen:
        assert len(arguments["hidden_states"]) == 1
        for suffix in ("", "_2"):
            mask = arguments[f"encoder_attention_mask{suffix}"]
            assert mask.all()
            assert mask.shape == arguments[f"encoder_hidden_states{suffix}"].shape[:2]


def test_the_channels_for_a_picture_and_its_tokens_are_empty(case: Case) -> None:
    (arguments,) = calls(case, PROMPTS[:1])
    assert arguments["hidden_states"].shape[1] == 65
    assert not arguments["hidden_states"][:, 32:].any()
    assert arguments["hidden_states"][:, :32].any()
    assert arguments["image_embeds"].shape == (1, 0, 16)
    assert arguments["timestep"].tolist() == [500.0]


def test_guidance_is_set_in_the_guider_and_falls_back_to_the_checkpoints(case: Case) -> None:
    for asked, expected in ((2.5, 2.5), (None, 6.0), (1.0, 1.0), (None, 6.0)):
        arguments = FAMILY.sampling_arguments(case.pipe, case.request(asked))
        assert "guidance_scale" not in arguments
        assert case.pipe.guider.guidance_scale == expected


@torch.no_grad()
def test_guidance_changes_what_is_drawn(case: Case) -> None:
    plain, guided = (record(case.pipe, sampling_arguments(case, guided=on)).after[-1] for on in (False, True))
    assert not torch.allclose(plain, guided, atol=1e-4)


def test_a_negative_prompt_that_would_do_nothing_is_refused() -> None:
    pipe = make_case("hunyuan_video15").pipe
    request = replace(make_case("hunyuan_video15").request(None), negative="fog")
    assert FAMILY.sampling_arguments(pipe, request)["negative_prompt"] == "fog"
    pipe.guider = pipe.guider.new(guidance_scale=1.0)  # as the distilled checkpoint has it
    with pytest.raises(ConfigError, match=r"negative prompt 'fog'.*validation.guidance"):
        FAMILY.sampling_arguments(pipe, request)
    assert FAMILY.sampling_arguments(pipe, replace(request, guidance=3.0))["negative_prompt"] == "fog"


def test_the_end_of_the_captions_stream_is_dead(case: Case) -> None:
    assert FAMILY.dead_modules(case.pipe.transformer) == (
        "transformer_blocks.1.attn.add_q_proj",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.1.ff_context.net.0.proj",
        "transformer_blocks.1.ff_context.net.2",
    )


@pytest.mark.parametrize(
    "change", [{"use_meanflow": True}, {"in_channels": 98}], ids=["two times", "a clip to sharpen"]
)
def test_a_denoiser_of_another_task_is_refused_before_it_runs(case: Case, change: dict[str, Any]) -> None:
    config = {key: value for key, value in case.pipe.transformer.config.items() if not key.startswith("_")} | change
    other = seeded(lambda: HunyuanVideo15Transformer3DModel(**config))
    with pytest.raises(ConfigError, match="65 channels with one time"):
        FAMILY.predict(other, torch.zeros(1, 32, 1, 2, 2), torch.ones(1), case.conditions(PROMPTS[:1]))


@torch.no_grad()
def test_clips_are_encoded_one_by_one(case: Case) -> None:
    """The autoencoder's attention fails on several."""
    pixels = case.pixels(2)
    together = FAMILY.encode_pixels(case.pipe, pixels)
    alone = [FAMILY.encode_pixels(case.pipe, clip) for clip in pixels.split(1)]
    assert torch.equal(together.mean, torch.cat([clip.mean for clip in alone]))
    assert together.std is not None
    assert together.std.shape == together.mean.shape


def test_a_checkpoint_that_draws_from_a_picture_is_refused_and_not_trained_on_zeros_in_its_place(
    tmp_path: Path,
) -> None:
    index = {"_class_name": "HunyuanVideo15ImageToVideoPipeline", "transformer": ["diffusers", "any"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="which trains checkpoints of HunyuanVideo15Pipeline, but the one in"):
        components.denoiser_names(FAMILY, tmp_path)
