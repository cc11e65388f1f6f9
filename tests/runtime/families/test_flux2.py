"""Flux.2: text of fixed length from three layers, latents by a batch norm's statistics, and two kinds of guidance."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import nn

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import components
from atelier_runtime.adapters import resolve_targets
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.objectives import build_objective
from atelier_runtime.objectives.flow import FlowObjective
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import PUBLISHED, save_tiny, tiny_pipeline
from stock_loader import draw

FAMILY = get_family("flux2")
KINDS = ("flux2", "flux2_klein")


@pytest.fixture(scope="module")
def dev() -> Case:
    return make_case("flux2")


@pytest.fixture(scope="module")
def klein() -> Case:
    return make_case("flux2_klein")


def texts_of(case: Case, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[str]:
    """What the text encoder is given while `run` runs, without the padding."""
    texts: list[str] = []
    original = case.pipe.text_encoder.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            texts.append(case.pipe.tokenizer.decode(ids[mask.bool()]))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(case.pipe.text_encoder, "forward", spy)
        run()
    return texts


@torch.no_grad()
def test_a_caption_of_dev_follows_the_system_message(dev: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = texts_of(dev, monkeypatch, lambda: FAMILY.encode_text(dev.pipe, ["a [IMG]fox"]))
    assert text.startswith("<|im_start|>You are an AI that reasons about image descriptions.")
    assert text.endswith("<|im_end|><|im_start|>a fox<|im_end|>")  # and no turn that asks for an answer


@torch.no_grad()
def test_a_caption_of_klein_is_a_turn_that_asks_for_an_answer_without_thinking(
    klein: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = texts_of(klein, monkeypatch, lambda: FAMILY.encode_text(klein.pipe, ["a fox"]))
    assert text == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize(("name", "layers"), [("flux2", (10, 20, 30)), ("flux2_klein", (9, 18, 27))], ids=KINDS)
@torch.no_grad()
def test_text_is_three_hidden_states_side_by_side_at_512_tokens(
    name: str, layers: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    case = request.getfixturevalue("dev" if name == "flux2" else "klein")
    hidden: dict[int, torch.Tensor] = {}
    blocks = next(
        module
        for part, module in case.pipe.text_encoder.named_modules()
        if part.endswith("layers") and len(module) > 20  # type: ignore[arg-type]
    )
    for number in layers:
        blocks[number - 1].register_forward_hook(  # type: ignore[index]
            lambda *hook, number=number: hidden.update({number: hook[2]})
        )
    (features,) = FAMILY.encode_text(case.pipe, PROMPTS[:1])
    assert features["embeds"].shape[0] == 512
    assert torch.equal(features["embeds"], torch.cat([hidden[number][0] for number in layers], dim=-1))


@torch.no_grad()
def test_padding_takes_part_in_attention_so_that_shorter_text_is_another_prediction(klein: Case) -> None:
    conditions = klein.conditions(PROMPTS[:1])
    noisy, time, _ = klein.noised(klein.latents(1), (0.5,))
    short = replace(conditions, text={"embeds": conditions.text["embeds"][:, :256]})
    whole, cut = (FAMILY.predict(klein.pipe.transformer, noisy, time, each) for each in (conditions, short))
    assert (whole - cut).abs().max() > 1e-5


@torch.no_grad()
def test_latents_are_those_the_pipeline_makes_of_a_reference_picture(klein: Case) -> None:
    pixels = klein.pixels(2)
    latents = FAMILY.encode_pixels(klein.pipe, pixels)
    assert latents.std is None
    torch.testing.assert_close(latents.mean, klein.pipe._encode_vae_image(pixels, generator=None))
    unnormalised = klein.pipe._patchify_latents(klein.pipe.vae.encode(pixels).latent_dist.mode())
    assert not torch.allclose(latents.mean, unnormalised, atol=0.1)


@torch.no_grad()
def test_training_asks_a_distilled_checkpoint_for_guidance_one(dev: Case) -> None:
    noisy, time, _ = dev.noised(dev.latents(1), [0.5])
    by_default, at_one, at_sampling = (
        FAMILY.predict(dev.pipe.transformer, noisy, time, dev.conditions(PROMPTS[:1], guidance))
        for guidance in (None, 1.0, 4.0)
    )
    assert torch.equal(by_default, at_one)
    assert not torch.equal(by_default, at_sampling)


@pytest.mark.parametrize(
    ("name", "guidance", "step_distilled", "way"),
    [
        ("flux2", 2.5, False, "is distilled: remove it"),
        ("flux2_klein", None, True, "is distilled: remove it"),
        ("flux2_klein", 1.0, False, "is sampled without guidance: set spec.validation.guidance above 1"),
    ],
    ids=["guidance is embedded", "few steps", "guidance is off"],
)
def test_a_negative_prompt_that_would_do_nothing_is_refused(
    name: str, guidance: float | None, step_distilled: bool, way: str
) -> None:
    case = make_case(name)
    if step_distilled:
        case.pipe.register_to_config(is_distilled=True)
    with pytest.raises(ConfigError, match=f"the negative prompt 'blurry'; the checkpoint {way}"):
        FAMILY.sampling_arguments(case.pipe, replace(case.request(guidance), negative="blurry"))


@torch.no_grad()
def test_klein_contrasts_with_the_negative_prompt(klein: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(negative: str | None) -> torch.Tensor:
        request = replace(klein.request(3.0, steps=1), negative=negative)
        return klein.pipe(**FAMILY.sampling_arguments(klein.pipe, request), output_type="latent").images

    without, empty, blurry = (sample(negative) for negative in (None, "", "blurry"))
    assert torch.equal(without, empty)
    assert not torch.equal(without, blurry)
    texts = texts_of(klein, monkeypatch, lambda: sample("blurry"))
    assert ["user\nblurry<|im_end|>" in text for text in texts] == [True, False]  # ours, then that of the picture


def test_the_table_knows_which_flavours_are_distilled_on_guidance() -> None:
    published = PUBLISHED["flux2"].denoisers
    embedded = {name: config.get("guidance_embeds", True) for name, (_, config) in published.items()}
    assert embedded == {flavour.name: flavour.guidance == "distilled" for flavour in FAMILY.facts.flavours}


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_loaded_by_the_pipeline_that_it_names(name: str, tmp_path: Path) -> None:
    made = type(tiny_pipeline(name))
    loaded = components.load_encoders(FAMILY, save_tiny(name, tmp_path), torch.float32, torch.device("cpu"))
    assert type(loaded) is made
    assert made.__name__ in FAMILY.facts.pipelines


def test_the_attention_preset_trains_single_blocks_whose_layers_are_fused_with_the_feed_forward() -> None:
    transformer = tiny_pipeline("flux2").transformer
    found = resolve_targets(transformer, ["attention"], FAMILY)
    assert {"single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"} <= set(found)
    # `to_out` is a layer there and a list in a block of two streams.
    assert all(isinstance(transformer.get_submodule(module), nn.Linear) for module in found)


@torch.no_grad()
def test_a_lora_in_the_layout_of_comfyui_is_loaded_by_the_stock_pipeline(tmp_path: Path) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
    result = trained("flux2", tmp_path, adapter, publish={"formats": ["kohya"]})
    (file,) = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("flux2")
    base = draw(pipe, result.arguments)
    pipe.load_lora_weights(file.path.parent, weight_name=file.path.name)
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3


def test_training_draws_with_the_shift_of_the_pipeline_and_not_with_that_of_its_scheduler(dev: Case) -> None:
    steps = inspect.signature(dev.pipe.__call__).parameters["num_inference_steps"].default
    objective = build_objective(Objective(), FAMILY.facts, dict(dev.pipe.scheduler.config))
    assert isinstance(objective, FlowObjective)
    for tokens in (64, 1024, 4096, 4300, 4301, 9000):
        expected = math.exp(compute_empirical_mu(tokens, steps))
        assert objective.shift.factor(tokens) == pytest.approx(expected)
