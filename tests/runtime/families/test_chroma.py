"""Chroma: a mask that weighs padding down, in every block and also where activations are recomputed; names in kohya's files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier_api.v1alpha1.adapter import FullAdapter
from atelier_runtime import adapters
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case
from family_models import tiny_pipeline
from stock_loader import draw

FAMILY = get_family("chroma")
# diffusers' reader of kohya's Flux files takes the first layer of a single block to have 3072 + ... rows.
ALL_BUT_FUSED_SINGLE = [
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)\..*",
    r"single_transformer_blocks\.\d+\.proj_out",
]


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("chroma")


@torch.no_grad()
def test_the_mask_keeps_the_caption_and_the_first_padding_token(case: Case) -> None:
    tokens = case.pipe.tokenizer(list(PROMPTS)).input_ids
    features = FAMILY.encode_text(case.pipe, PROMPTS)
    assert [len(one["mask"]) for one in features] == [case.pipe.tokenizer.model_max_length] * 2
    short = features[0]["mask"]
    assert short[: len(tokens[0]) + 1].all()
    assert not short[len(tokens[0]) + 1 :].any()
    assert len(short) > len(tokens[0]) + 1
    assert features[1]["mask"].all()  # a caption that is cut off has no padding


@torch.no_grad()
def test_padding_counts_as_much_as_when_sampling(case: Case) -> None:
    """Attention adds the pipeline's mask of floats to its logits; a mask of true and false would hide the padding."""
    conditions = case.conditions(PROMPTS[:1])
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    mask = conditions.text["mask"]
    before = FAMILY.predict(case.pipe.transformer, noisy, time, conditions)
    conditions.text["embeds"][~mask] += 1
    assert (FAMILY.predict(case.pipe.transformer, noisy, time, conditions) - before).abs().max() > 1e-5


def test_single_blocks_get_the_mask_where_activations_are_recomputed(case: Case) -> None:
    """diffusers calls them without it then, so that the network in training is not the one that samples."""
    denoiser = tiny_pipeline("chroma").transformer
    masks: list[Tensor | None] = []
    for block in denoiser.single_transformer_blocks:
        block.attn.register_forward_pre_hook(
            lambda _, __, arguments: masks.append(arguments["attention_mask"]), with_kwargs=True
        )
    adapters.install(denoiser, FullAdapter(type="full"), FAMILY)
    denoiser.enable_gradient_checkpointing()
    recompute = denoiser._gradient_checkpointing_func
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    conditions = case.conditions(PROMPTS[:1])
    FAMILY.predict(denoiser, noisy, time, conditions).square().sum().backward()
    kept = int(conditions.text["mask"].sum()) + 2 * 4
    assert len(masks) == 4  # forwards, and again for the backward pass
    for mask in masks:
        assert mask is not None
        assert mask.sum() == kept**2
    assert denoiser._gradient_checkpointing_func is recompute


@pytest.mark.parametrize(("allowed", "tokens"), [(10**30, 512), (512, 512), (16, 16)])
@torch.no_grad()
def test_text_has_512_tokens_as_when_sampling(allowed: int, tokens: int) -> None:
    case = make_case("chroma")
    case.pipe.tokenizer.model_max_length = allowed
    assert FAMILY.encode_text(case.pipe, ["a"])[0]["embeds"].shape[0] == tokens
    assert FAMILY.sampling_arguments(case.pipe, case.request(None))["max_sequence_length"] == tokens


@torch.no_grad()
def test_it_does_not_train_to_noise(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that points from the picture to the noise has no loss, and the stock pipeline draws the picture with it."""
    clean = case.latents(1)
    noisy, time, target = case.noised(clean, (1.0,))
    packed = case.tiny.from_grid(case.pipe, target)
    monkeypatch.setattr(case.pipe.transformer, "forward", lambda **_: (packed,))
    assert torch.equal(FAMILY.predict(case.pipe.transformer, noisy, time, case.conditions(PROMPTS[:1])), target)
    arguments: dict[str, Any] = FAMILY.sampling_arguments(case.pipe, case.request(1.0))
    start = case.tiny.from_grid(case.pipe, noisy)
    drawn = case.pipe(**arguments, latents=start, output_type="latent").images
    torch.testing.assert_close(case.tiny.to_grid(case.pipe, drawn), clean, atol=1e-5, rtol=1e-5)


def test_every_layer_of_the_presets_has_a_name_in_comfyui() -> None:
    layout = FAMILY.lora_layout
    assert layout is not None
    modules = adapters.resolve_targets(tiny_pipeline("chroma").transformer, ["all"], FAMILY)
    assert [module for module in modules if layout.key(module) is None] == []
    names = {
        "transformer_blocks.18.attn.add_q_proj": "lora_unet_double_blocks_18_txt_attn_qkv",
        "transformer_blocks.0.ff.net.2": "lora_unet_double_blocks_0_img_mlp_2",
        "single_transformer_blocks.7.proj_mlp": "lora_unet_single_blocks_7_linear1",
        "single_transformer_blocks.7.proj_out": "lora_unet_single_blocks_7_linear2",
    }
    keys = {module: layout.key(module) for module in names}
    assert {module: key and key.name for module, key in keys.items()} == names


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@torch.no_grad()
def test_the_stock_pipeline_draws_with_an_exported_lora_what_the_training_side_draws(form: str, tmp_path: Path) -> None:
    adapter = {"type": "lora", "rank": 4, "alpha": 9, "targets": ALL_BUT_FUSED_SINGLE}
    result = trained("chroma", tmp_path, adapter, publish={"formats": [form]})
    files = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    ours = result.picture()
    pipe = tiny_pipeline("chroma")
    base = draw(pipe, result.arguments)
    pipe.load_lora_weights(str(files[0].path.parent), weight_name=files[0].path.name)
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
