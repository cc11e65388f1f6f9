"""LayerSync by itself: its numbers, which tokens it compares, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_api.v1alpha1.techniques import LayerSync as LayerSyncSpec
from atelier_api.v1alpha1.techniques import Techniques
from atelier_runtime import adapters
from atelier_runtime.family import Streams
from atelier_runtime.techniques import Pass, Technique, build_techniques
from atelier_runtime.techniques.layer_sync import alignment
from atelier_runtime.techniques.picture_blocks import counted_tokens, picture_blocks, picture_tokens
from family_cases import Case, make_case

TEXT, PICTURE, BEHIND = 3, 4, 2
"""Tokens of a text, of what is drawn, and of what follows it: references, or padding."""


def tokens(batch: int, count: int, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def test_a_block_that_is_its_own_teacher_is_aligned_and_gets_no_gradient() -> None:
    hidden = tokens(2, 6).requires_grad_()
    aligned = alignment(hidden, hidden, None)
    torch.testing.assert_close(aligned, torch.ones(2))
    aligned.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-6


def test_orthogonal_tokens_are_not_aligned_and_opposite_ones_against_each_other() -> None:
    one, other = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    one[..., 0], other[..., 1] = 2.0, 3.0
    assert alignment(one, other, None).item() == 0
    assert alignment(one, -7 * one, None).item() == -1


def test_the_gradient_is_that_of_the_mean_cosine_and_goes_to_the_student_alone() -> None:
    student, teacher = tokens(2, 6).requires_grad_(), tokens(2, 6, seed=1).requires_grad_()
    alignment(student, teacher, None).sum().backward()
    with torch.no_grad():
        length = student.norm(dim=-1, keepdim=True)
        one, other = student / length, teacher / teacher.norm(dim=-1, keepdim=True)
        cosine = (one * other).sum(dim=-1, keepdim=True)
        torch.testing.assert_close(student.grad, (other - cosine * one) / length / 6)
    assert teacher.grad is None


def test_the_mean_is_over_the_tokens_that_count() -> None:
    student, teacher = tokens(2, 6), tokens(2, 6, seed=1)
    counted = torch.tensor([[0.0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    expected = [alignment(student[:1, 2:], teacher[:1, 2:], None), alignment(student[1:, :5], teacher[1:, :5], None)]
    torch.testing.assert_close(alignment(student, teacher, counted), torch.cat(expected))


def test_bf16_tokens_are_compared_in_fp32() -> None:
    student, teacher = tokens(1, 400, 64).bfloat16(), tokens(1, 400, 64, seed=1).bfloat16()
    aligned = alignment(student, teacher, None)
    assert aligned.dtype == torch.float32
    torch.testing.assert_close(aligned, alignment(student.float(), teacher.float(), None))


def test_two_copies_in_fp32_are_kept_for_the_backward_pass() -> None:
    """As the planner counts it, which takes three more for the moment of the comparison."""
    width, count = 64, 400
    student, teacher = tokens(1, count, width).bfloat16().requires_grad_(), tokens(1, count, width, seed=1).bfloat16()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alignment(student, teacher, None)
    assert 2 * 4 * count * width <= sum(kept.values()) < 1.1 * 2 * 4 * count * width


STREAMS: dict[Streams, Callable[[Tensor, Tensor, Tensor], object]] = {
    "tokens": lambda text, picture, behind: torch.cat([picture, behind], dim=1),
    "text,tokens": lambda text, picture, behind: (text, torch.cat([picture, behind], dim=1)),
    "tokens,text": lambda text, picture, behind: (torch.cat([picture, behind], dim=1), text),
    "tokens|text": lambda text, picture, behind: torch.cat([picture, behind, text], dim=1),
    "text|tokens": lambda text, picture, behind: torch.cat([text, picture], dim=1),
}


@pytest.mark.parametrize("streams", STREAMS)
def test_text_and_what_follows_the_picture_are_left_out(streams: Streams) -> None:
    text, picture, behind = tokens(2, TEXT, seed=1), tokens(2, PICTURE), tokens(2, BEHIND, seed=2)
    output = STREAMS[streams](text, picture, behind)
    assert torch.equal(picture_tokens(output, streams, PICTURE, None), picture)


def test_a_picture_begins_where_its_own_text_ends() -> None:
    pictures = tokens(2, PICTURE)
    rows = [
        torch.cat([tokens(1, length, seed=1)[0], picture, torch.zeros(5 - length, 5)])
        for length, picture in zip((2, 5), pictures, strict=True)
    ]
    found = picture_tokens(torch.stack(rows), "text|tokens|padding", PICTURE, torch.tensor([2, 5]))
    assert torch.equal(found, pictures)


def test_all_of_a_map_and_of_a_units_tokens_are_taken() -> None:
    maps = torch.arange(24.0).view(1, 2, 3, 4)
    found = picture_tokens((maps, ()), "maps", 1, None)
    assert found.shape == (1, 12, 2)
    assert found[0, 5].tolist() == maps[0, :, 1, 1].tolist()
    assert torch.equal(picture_tokens(found, "maps", 1, None), found)


def test_tokens_of_frames_that_are_shown_do_not_count() -> None:
    latents, mask = torch.zeros(2, 3, 3, 4, 4), torch.ones(1, 1, 3, 1, 1)
    mask[:, :, 0] = 0
    counted = counted_tokens(mask, latents, patch=2)
    assert counted is not None
    assert counted.tolist() == [[0.0] * 4 + [1.0] * 8] * 2
    assert counted_tokens(None, latents, patch=2) is None


def layer_sync(case: Case, denoiser: nn.Module, student: int, teacher: int) -> Technique:
    spec = Techniques(layer_sync=LayerSyncSpec(student_block=student, teacher_block=teacher))
    [technique] = build_techniques(spec, case.family, {"denoiser": denoiser})
    return technique


def loss_of(case: Case, denoiser: nn.Module, technique: Technique, count: int = 1) -> Tensor:
    conditions, clean = case.conditions(["a fox"] * count), case.latents(count)
    noisy, time, _ = case.noised(clean, [0.5] * count)
    with technique.watching():
        case.family.predict(denoiser, noisy, time, conditions)
    return technique.loss(Pass(clean, conditions, case.family.loss_mask(clean, conditions)))


def test_nothing_is_built_where_nothing_is_asked_for() -> None:
    case = make_case("sd3")
    assert build_techniques(Techniques(), case.family, case.denoisers) == ()
    assert not any(module._forward_hooks for module in case.denoisers["transformer"].modules())


def test_what_is_not_watched_is_not_kept() -> None:
    case = make_case("sd3")
    denoiser = case.denoisers["transformer"]
    technique = layer_sync(case, denoiser, 0, 1)
    expected = loss_of(case, denoiser, technique)
    clean = case.latents(1)
    noisy, time, _ = case.noised(clean, [0.9])
    conditions = case.conditions(["a lighthouse"])
    case.family.predict(denoiser, noisy, time, conditions)  # a sample that is drawn, or a recomputation
    with pytest.raises(ValueError, match="non-empty"):  # nor is what has been asked for given twice
        technique.loss(Pass(clean, conditions, None))
    assert torch.equal(loss_of(case, denoiser, technique), expected)


def test_a_block_beyond_the_checkpoints_last_is_refused() -> None:
    case = make_case("sd3")
    with pytest.raises(ConfigError) as error:
        layer_sync(case, case.denoisers["transformer"], 0, 3)
    assert str(error.value) == (
        "spec.techniques.layerSync.teacherBlock is 3; must be at most 2: the tokens of what is drawn go through 3 blocks of the "
        "checkpoint in spec.model.source, the first is 0"
    )


def test_blocks_of_two_stages_of_a_unet_are_refused_with_those_that_fit() -> None:
    case = make_case("sd15")
    unet = case.denoisers["unet"]
    names = [block.name for block in picture_blocks(unet, case.family)]
    assert names == [
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
    ]
    unet.requires_grad_(True)
    with pytest.raises(ConfigError) as error:
        loss_of(case, unet, layer_sync(case, unet, 0, 1))
    assert "block 0 (down_blocks.0.attentions.0.transformer_blocks.0) " in str(error.value)
    assert "take two of 0–0 (down_blocks.0), 1–1 (mid_block.attentions.0), 2–3 (up_blocks.1)" in str(error.value)
    assert loss_of(case, unet, layer_sync(case, unet, 0, 3)).shape == (1,)


def test_an_adapter_behind_the_student_is_refused_since_nothing_would_learn() -> None:
    case = make_case("sd3")
    denoiser = case.denoisers["transformer"]
    adapters.install(denoiser, LoraAdapter(rank=2, targets=[r"transformer_blocks\.1\..*to_q"]), case.family)
    with pytest.raises(
        ConfigError, match=r"studentBlock is 0 \(transformer_blocks\.0\), and no trained weight is in it"
    ):
        loss_of(case, denoiser, layer_sync(case, denoiser, 0, 2))
    assert loss_of(case, denoiser, layer_sync(case, denoiser, 1, 2)).requires_grad
