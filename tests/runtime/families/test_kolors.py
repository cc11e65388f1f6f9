"""Kolors: the checkpoint's own schedule, text of a fixed length, no prompt at all, and LoRA files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atelier_api.v1alpha1.objective import Objective
from atelier_runtime import components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.families import get_family
from atelier_runtime.family import Stage
from atelier_runtime.objectives import build_objective
from export_runs import PROVENANCE, trained
from family_cases import PROMPTS, Case, make_case, record, sampling_arguments
from family_models import save_tiny, tiny_pipeline
from stock_loader import draw

FAMILY = get_family("kolors")
LORA = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("kolors")


def test_noise_is_drawn_at_all_1100_steps_of_the_checkpoint_and_by_its_betas(case: Case, tmp_path: Path) -> None:
    save_tiny("kolors", tmp_path)
    objective = build_objective(Objective(), FAMILY.facts, components.scheduler_config(tmp_path))
    clean = torch.ones(400, 1, 1, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(clean))]
    made = objective.prepare(clean, generators, stage=Stage("unet"), tokens=1)
    assert 1050 < made.time.max() < 1100
    kept = case.pipe.scheduler.alphas_cumprod[made.time].view_as(clean)
    assert len(case.pipe.scheduler.alphas_cumprod) == 1100
    torch.testing.assert_close(made.noisy, kept.sqrt() * clean + (1 - kept).sqrt() * made.target)


@torch.no_grad()
def test_captions_have_256_tokens_and_are_not_cut_at_77(case: Case) -> None:
    start = "a" * 100
    one, other, longest, longer = FAMILY.encode_text(case.pipe, [start + "b", start + "c", start * 3, start * 3 + "b"])
    assert one["embeds"].shape == (256, case.pipe.text_encoder.config.hidden_size)
    assert not torch.equal(one["embeds"], other["embeds"])
    assert torch.equal(longest["embeds"], longer["embeds"])


@torch.no_grad()
def test_the_padding_stands_before_the_text_and_counts(case: Case) -> None:
    """Attention sees it: text at its true length would be another prompt than the pipeline's."""
    conditions = case.conditions(PROMPTS[:1])
    length = len(case.pipe.tokenizer(PROMPTS[0]).input_ids)
    embeds = conditions.text["embeds"]
    ids = torch.tensor([case.pipe.tokenizer(PROMPTS[0]).input_ids])
    alone = case.pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(embeds[0, -length:], alone[-2][:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conditions.text["pooled"][0], alone[-1][-1, 0], atol=1e-5, rtol=1e-5)
    noisy, time, _ = case.noised(case.latents(1), (0.5,))
    short = replace(conditions, text=conditions.text | {"embeds": embeds[:, -length:]})
    difference = FAMILY.predict(case.pipe.unet, noisy, time, conditions) - FAMILY.predict(
        case.pipe.unet, noisy, time, short
    )
    assert difference.abs().max() > 1e-5


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "encoded"])
@torch.no_grad()
def test_without_a_negative_prompt_the_pipeline_contrasts_with_the_empty_caption(zeros: bool) -> None:
    """With `force_zeros_for_empty_prompt` the pipeline fails where it is given none."""
    case = make_case("kolors")
    case.pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    (empty,) = FAMILY.encode_text(case.pipe, [""])
    assert empty["embeds"].any()
    seen: list[torch.Tensor] = []
    handle = case.pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    record(case.pipe, sampling_arguments(case, guided=True))
    handle.remove()
    torch.testing.assert_close(seen[0][0], empty["embeds"])


@torch.no_grad()
def test_an_exported_lora_is_of_the_unet_and_draws_what_the_training_side_draws(tmp_path: Path) -> None:
    result = trained("kolors", tmp_path, LORA, publish={"formats": ["diffusers"]})
    [file] = export_lora(result.weights, result.file, FAMILY, tmp_path, provenance=PROVENANCE)
    assert {name.split(".")[0] for name in load_file(file.path)} == {"unet"}
    ours = result.picture()
    pipe = tiny_pipeline("kolors")
    base = draw(pipe, result.arguments)
    pipe.load_lora_weights(file.path.parent, weight_name=file.path.name)
    loaded = draw(pipe, result.arguments)
    assert abs(loaded - ours).max() <= 1e-5
    assert abs(loaded - base).max() > 1e-3
