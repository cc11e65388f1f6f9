"""LayerSync on every family: it compares the tokens that the prediction is made of, and only what it may reach learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.v1alpha1.adapter import FullAdapter
from atelier_api.v1alpha1.techniques import LayerSync as LayerSyncSpec
from atelier_runtime import adapters
from atelier_runtime.family import Conditions, latent_tokens
from atelier_runtime.techniques import Pass
from atelier_runtime.techniques.layer_sync import LayerSync
from atelier_runtime.techniques.picture_blocks import PictureBlock, counted_tokens, picture_blocks, picture_tokens
from family_cases import CASES, PROMPTS, Case, make_case

pytestmark = pytest.mark.cell("layersync")

LEVELS = (0.3, 0.9)
WEIGHT = 0.2


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """All weights train; no test changes one."""
    case = make_case(request.param)
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
        outputs: list[Any] = []
        handle = last.module.register_forward_hook(lambda *hook, seen=outputs: seen.append(hook[2]))
        prediction = case.family.predict(denoiser, noisy, time, conditions)
        handle.remove()
        hidden = [picture_of(last, output) for output in outputs]
        first = 0
        for output, places in zip(outputs, touched(prediction * (1 if mask is None else mask), hidden), strict=True):
            rows = slice(first, first + len(places))
            lengths = conditions.text["mask"].sum(dim=1)[rows] if "padding" in last.streams else None
            tokens = picture_tokens(output, last.streams, latent_tokens(case.family, clean), lengths)
            if counted is not None:
                tokens = tokens * counted[rows].unsqueeze(2)
            [found] = touched(tokens, [picture_of(last, output)])
            assert torch.equal(found, places)
            first = rows.stop
        assert first == len(clean)


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
