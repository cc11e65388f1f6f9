"""LayerSync on every family: it compares the tokens that the prediction is made of, and only what it may reach learns."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_api.v1alpha1.adapter import FullAdapter
from atelier_api.v1alpha1.techniques import LayerSync as LayerSyncSpec
from atelier_runtime import adapters
from atelier_runtime.family import Conditions, latent_tokens
from atelier_runtime.techniques import Pass
from atelier_runtime.techniques.layer_sync import LayerSync
from atelier_runtime.techniques.picture_blocks import PictureBlock, counted_tokens, picture_blocks, picture_tokens
from family_cases import CASES, PROMPTS, Case
from shared_cases import shared_case

pytestmark = [pytest.mark.cell("layersync"), pytest.mark.sweep]

LEVELS = (0.3, 0.9)
WEIGHT = 0.2
CONVOLVED = ("sana", "sdxl", "kolors", "sd15", "sd21", "stable_cascade", "ace_step_v1")
"""With convolutions in their blocks or between them."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """All weights train; no test changes one."""
    case = shared_case(request.param)
    for denoiser in case.denoisers.values():
        adapters.install(denoiser, FullAdapter(type="full"), case.family)
    return case


def blocks_of(case: Case, denoiser: nn.Module) -> list[PictureBlock]:
    """But for those of a UNet's other resolutions than the first's."""
    found = picture_blocks(denoiser, case.family)
    return [found[0], *found[2:]] if case.name in ("sd15", "sd21") else found


def layer_sync(case: Case, denoiser: nn.Module) -> LayerSync:
    """Of the first and the last block."""
    last = len(picture_blocks(denoiser, case.family)) - 1
    spec = LayerSyncSpec(student_block=0, teacher_block=last, weight=WEIGHT)
    return LayerSync(spec, case.family, {"denoiser": denoiser})


def passed(
    case: Case, denoiser: nn.Module, sync: LayerSync, given: tuple[Tensor, Tensor, Tensor], conditions: Conditions
) -> tuple[Tensor, Tensor]:
    """The prediction and LayerSync's loss [B] of (clean, noisy, time)."""
    clean, noisy, time = given
    with sync.watching():
        prediction = case.family.predict(denoiser, noisy, time, conditions)
    return prediction, sync.loss(Pass(clean, conditions, case.family.loss_mask(clean, conditions)))


@torch.no_grad()
def test_two_samples_with_texts_of_unequal_length_have_the_losses_of_the_two_alone(case: Case) -> None:
    clean = case.latents(2)
    noisy, time, _ = case.noised(clean, LEVELS)
    for denoiser in case.denoisers.values():
        conditions = case.conditions(PROMPTS)
        plain = case.family.predict(denoiser, noisy, time, conditions)
        sync = layer_sync(case, denoiser)
        prediction, losses = passed(case, denoiser, sync, (clean, noisy, time), conditions)
        assert torch.equal(prediction, plain)
        alone = []
        for i in (0, 1):
            told, row = case.conditions([PROMPTS[i]], samples=[i]), slice(i, i + 1)
            alone.append(passed(case, denoiser, sync, (clean[row], noisy[row], time[row]), told)[1])
        torch.testing.assert_close(losses, torch.cat(alone), atol=1e-5, rtol=1e-5)
        assert losses.abs().max() <= WEIGHT
        assert losses.abs().min() > 1e-6


def test_the_gradient_reaches_no_block_behind_the_student_and_is_the_same_with_recomputed_activations(
    case: Case,
) -> None:
    conditions, clean = case.conditions(PROMPTS), case.latents(2)
    noisy, time, target = case.noised(clean, LEVELS)
    for denoiser in case.denoisers.values():
        student, *later = blocks_of(case, denoiser)
        sync, trained = layer_sync(case, denoiser), adapters.trainable(denoiser)
        results = []
        for recompute in (False, True):
            if recompute:
                denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            prediction, losses = passed(case, denoiser, sync, (clean, noisy, time), conditions)
            if not recompute:
                reached = reach(losses, trained)
                assert any(name.startswith(f"{student.name}.") for name in reached)
                assert [name for name in reached if name.startswith(tuple(f"{block.name}." for block in later))] == []
            total = case.loss(prediction, target, conditions) + losses.mean()
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
            results.append((losses.detach(), gradients))
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
        (losses_off, gradients_off), (losses_on, gradients_on) = results
        assert torch.equal(losses_off, losses_on)
        for name, off, on in zip(trained, gradients_off, gradients_on, strict=True):
            torch.testing.assert_close(off, on, atol=1e-7, rtol=1e-5, msg=name)


def reach(losses: Tensor, trained: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that the loss has a gradient for."""
    found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True, retain_graph=True)
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is not None and gradient.any()]


def test_the_tokens_of_the_last_block_are_those_that_the_prediction_is_made_of(case: Case) -> None:
    """The network itself says which they are: what it predicts, where that counts, hangs on them and on no others."""
    conditions, clean = case.conditions(PROMPTS), case.latents(2)
    noisy, time, _ = case.noised(clean, LEVELS)
    mask = case.family.loss_mask(clean, conditions)
    counted = counted_tokens(mask, clean, case.family.facts.patch)
    for denoiser in case.denoisers.values():
        last = picture_blocks(denoiser, case.family)[-1]
        prediction, [outputs] = predicted(case, denoiser, [last], (noisy, time), conditions)
        hidden = [picture_of(last, output) for output in outputs]
        taken = tokens_of(case, last, outputs, clean, conditions)
        if counted is not None:
            taken = taken * counted.unsqueeze(2)
        places = touched(prediction * (1 if mask is None else mask), hidden)
        for expected, found in zip(places, touched(taken, hidden), strict=True):
            assert torch.equal(found, expected)


@torch.no_grad()
def test_where_attention_mixes_nothing_a_patch_of_the_latents_is_in_the_token_of_its_place_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tokens of every block are those of what is drawn, and in one order: that in which `counted_tokens` counts them."""
    if case.name in CONVOLVED:
        pytest.skip("convolutions mix tokens, of which none are the text's: those of the last block are tested above")
    monkeypatch.setattr(functional, "scaled_dot_product_attention", own_value)
    conditions, clean = case.conditions(PROMPTS), case.latents(2)
    noisy, time, _ = case.noised(clean, LEVELS)
    counted = counted_tokens(case.family.loss_mask(clean, conditions), clean, case.family.facts.patch)
    count = latent_tokens(case.family, clean)
    first = 0 if counted is None else int(counted[0].nonzero()[0])
    for denoiser in case.denoisers.values():
        blocks = picture_blocks(denoiser, case.family)

        def tokens(given: Tensor, network: nn.Module = denoiser, blocks: list[PictureBlock] = blocks) -> list[Tensor]:
            outputs = predicted(case, network, blocks, (given, time), conditions)[1]
            return [tokens_of(case, block, of, clean, conditions) for block, of in zip(blocks, outputs, strict=True)]

        plain = tokens(noisy)
        for place in (first, count - 2):
            marked = tokens(with_patch_changed(case, noisy, place))
            for block, one, other in zip(blocks, plain, marked, strict=True):
                assert one.shape[1] == count, block.name
                changed = (one != other).any(dim=2)
                assert changed.nonzero().tolist() == [[0, place], [1, place]], block.name


@torch.no_grad()
@pytest.mark.parametrize("name", ["ace_step", "ace_step_v1"])
def test_a_sound_that_is_shorter_than_its_bucket_has_the_loss_that_it_has_alone(name: str) -> None:
    case = shared_case(name)
    [denoiser] = case.denoisers.values()
    clean, sync = case.latents(2), layer_sync(case, denoiser)
    noisy, time, _ = case.noised(clean, LEVELS)
    lengths = [clean.shape[-1], clean.shape[-1] - 3]
    told = replace(case.conditions(PROMPTS), lengths=torch.tensor(lengths))
    losses = passed(case, denoiser, sync, (clean, noisy, time), told)[1]
    for i, length in enumerate(lengths):
        row, alone = slice(i, i + 1), case.conditions([PROMPTS[i]], samples=[i])
        given = (clean[row, :, :length], noisy[row, :, :length], time[row])
        torch.testing.assert_close(passed(case, denoiser, sync, given, alone)[1], losses[row], atol=1e-5, rtol=1e-5)


def own_value(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of attention: each token is given its own value, and nothing where it looks at others than those of its kind."""
    if key.shape[-2] != query.shape[-2]:
        return torch.zeros_like(query)
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def with_patch_changed(case: Case, latents: Tensor, place: int) -> Tensor:
    """Latents with another number in the patch that is the token of this place, frame by frame and row by row."""
    patch, changed = case.family.facts.patch, latents.clone()
    if latents.ndim == 3:
        changed[..., patch * place] += 1
        return changed
    rows, columns = (edge // patch for edge in latents.shape[-2:])
    frame, row, column = place // (rows * columns), place // columns % rows, place % columns
    one = changed[:, :, frame] if latents.ndim == 5 else changed
    one[..., patch * row, patch * column] += 1
    return changed


def predicted(
    case: Case, denoiser: nn.Module, blocks: list[PictureBlock], given: tuple[Tensor, Tensor], conditions: Conditions
) -> tuple[Tensor, list[list[Any]]]:
    """The prediction of (noisy, time), and what each of the blocks returned in each call."""
    outputs: list[list[Any]] = [[] for _ in blocks]
    with ExitStack() as stack:
        for block, seen in zip(blocks, outputs, strict=True):
            handle = block.module.register_forward_hook(lambda *hook, seen=seen: seen.append(hook[2]))
            stack.callback(handle.remove)
        return case.family.predict(denoiser, *given, conditions), outputs


def tokens_of(case: Case, block: PictureBlock, outputs: list[Any], latents: Tensor, conditions: Conditions) -> Tensor:
    """[B, N, D] of what is drawn, of a block's outputs for B samples."""
    found: list[Tensor] = []
    first = 0
    for output in outputs:
        rows = slice(first, first + len(picture_of(block, output)))
        lengths = conditions.text["mask"].sum(dim=1)[rows] if "padding" in block.streams else None
        found.append(picture_tokens(output, block.streams, latent_tokens(case.family, latents), lengths))
        first = rows.stop
    assert first == len(latents)
    return torch.cat(found)


def picture_of(block: PictureBlock, output: Any) -> Tensor:
    """The tensor in what a block returns that has the picture's tokens, be it among others."""
    if "," in block.streams:
        found: Tensor = output[block.streams.split(",").index("tokens")]
        return found
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def touched(result: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of each tensor [B, N, D] or [B, C, H, W], the places whose numbers change `result`, [B, N] or [B, H, W]."""
    gradients = torch.autograd.grad(result.square().sum(), tensors, retain_graph=True)
    return [gradient.any(dim=1 if gradient.ndim == 4 else 2) for gradient in gradients]
