"""One suite over all families: what the runtime trains is what the stock pipeline samples with.

Real diffusers classes at tiny size. A wrong sign, time, packing, text length or latent scale trains just as smoothly as the right
one, so nothing but the comparison with the pipeline would reveal it.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atelier_api.v1alpha1.adapter import FullAdapter, LokrAdapter, LoraAdapter
from atelier_runtime import adapters, components
from atelier_runtime.checkpoint.export import export_lora
from atelier_runtime.family import Blocks, Conditions
from export_runs import PROVENANCE, load_as_reported, trained
from family_cases import CASES, PROMPTS, Case, record, sampling_arguments, walk
from family_models import save_tiny
from shared_cases import shared_case

pytestmark = pytest.mark.sweep

LEVELS = (0.3, 0.9)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Shared by the tests that change no weight."""
    return shared_case(request.param)


@pytest.fixture(params=CASES)
def fresh(request: pytest.FixtureRequest) -> Case:
    return shared_case(request.param)


def predicted(
    case: Case, denoiser: nn.Module, conditions: Conditions, levels: tuple[float, ...] = LEVELS
) -> tuple[Tensor, Tensor]:
    """(prediction, target) for as many real samples as there are levels."""
    noisy, time, target = case.noised(case.latents(len(levels)), levels)
    return case.family.predict(denoiser, noisy, time, conditions), target


@pytest.mark.cell("sampling")
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@torch.no_grad()
def test_sampling_with_the_family_follows_the_stock_pipeline_step_by_step(case: Case, guided: bool) -> None:
    recording = record(case.pipe, sampling_arguments(case, guided=guided))
    assert len(recording.after) == case.tiny.steps
    for ours, theirs in walk(case, recording, guided=guided):
        # Rounding grows with the latents: a cosine's first step makes those of a random network forty times as large as noise.
        size = float(theirs.std()) if case.family.facts.noise_schedule == "cosine" else 1.0
        torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, size), rtol=1e-5)


@pytest.mark.cell("latents")
@pytest.mark.parametrize("deviation", [0.0, 1.0], ids=["mean", "one standard deviation"])
@torch.no_grad()
def test_the_pipeline_decodes_our_latents_to_what_the_autoencoder_makes_of_its_own(
    case: Case, deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, pixels = case.pipe, case.pixels(1)
    if not hasattr(pipe, "vae"):
        pytest.skip("another diffusion model decodes its latents, none that gives them back")
    mean, std = own_latents(pipe.vae, pixels.unsqueeze(2) if case.tiny.clips else pixels)
    latents = case.family.encode_pixels(pipe, pixels)
    if deviation and latents.std is None:
        pytest.skip("the pipeline takes the posterior's mode, there is no deviation to train on")
    ours = latents.mean if latents.std is None else latents.mean + deviation * latents.std
    expected = pipe.vae.decode(mean + deviation * std).sample
    if case.tiny.clips:
        expected = expected.squeeze(2)
    packed = case.tiny.from_grid(pipe, ours)

    # A scheduler that gives our latents for the result of the step runs exactly the tail of the pipeline on them.
    arguments = case.family.sampling_arguments(pipe, case.request(None, steps=1))
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: (packed,))
    output = pipe(**arguments, output_type="pt")
    decoded = output.frames.transpose(1, 2) if case.family.facts.modality == "video" else output[0]
    assert decoded.std() > 1e-3
    tolerance = case.tiny.picture_step + 1e-5
    torch.testing.assert_close(decoded, case.tiny.finish(expected), atol=tolerance, rtol=1e-5)


def own_latents(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | float]:
    """Mean and deviation as the autoencoder gives them; one without a posterior has no deviation."""
    output = vae.encode(pixels)
    return (output.latent, 0.0) if hasattr(output, "latent") else (output.latent_dist.mean, output.latent_dist.std)


@pytest.mark.cell("latents")
@torch.no_grad()
def test_latents_have_the_shape_of_the_facts(case: Case) -> None:
    facts, pixels = case.family.facts, case.pixels(1)
    shape = case.family.encode_pixels(case.pipe, pixels).mean.shape
    frames = [(case.tiny.frames - 1) // facts.temporal_factor + 1] if facts.modality == "video" else []
    edges = pixels.shape[-1:] if facts.modality == "audio" else pixels.shape[-2:]
    channels = case.tiny.channels or facts.latent_channels
    assert list(shape) == [1, channels, *frames, *(size // facts.latent_factor for size in edges)]


@pytest.mark.cell("batch")
@torch.no_grad()
def test_a_batch_of_two_prompts_of_unequal_length_equals_the_two_alone(case: Case) -> None:
    clean = case.latents(2)
    noisy, time, target = case.noised(clean, LEVELS)
    for denoiser in case.denoisers.values():
        conditions = case.conditions(PROMPTS)
        together = case.family.predict(denoiser, noisy, time, conditions)
        told = [case.conditions([PROMPTS[i]], samples=[i]) for i in (0, 1)]
        alone = [case.family.predict(denoiser, noisy[i : i + 1], time[i : i + 1], told[i]) for i in (0, 1)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
        losses = [case.loss(one, target[i : i + 1], told[i]) for i, one in enumerate(alone)]
        torch.testing.assert_close(
            case.loss(together, target, conditions), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.cell("conditions")
@torch.no_grad()
def test_the_prompt_changes_the_prediction(case: Case) -> None:
    """Text that never arrives would pass every comparison of two wrong things."""
    denoiser = next(iter(case.denoisers.values()))
    one, _ = predicted(case, denoiser, case.conditions([PROMPTS[0]] * 2))
    other, _ = predicted(case, denoiser, case.conditions([PROMPTS[1]] * 2))
    assert (one - other).abs().max() > 1e-5


@pytest.mark.cell("conditions")
@torch.no_grad()
def test_each_frame_that_is_shown_changes_the_prediction(case: Case) -> None:
    if not case.given:
        pytest.skip("it is shown no frame of the clip")
    told, pixels = case.conditions(PROMPTS), case.pixels(2)
    noisy, time, _ = case.noised(case.latents(2), LEVELS)
    for denoiser in case.denoisers.values():
        expected = case.family.predict(denoiser, noisy, time, told)
        for place in case.places:
            other = pixels.clone()
            other[:, :, place] *= -1
            frames = case.family.encode_frames(case.pipe, other, case.given)
            changed = case.family.predict(denoiser, noisy, time, replace(told, frames=frames))
            assert (changed - expected).abs().max() > 1e-5


@pytest.mark.cell("lora")
def test_every_lora_matrix_gets_a_gradient_and_nothing_else(fresh: Case) -> None:
    conditions = fresh.conditions(PROMPTS)
    for denoiser in fresh.denoisers.values():
        adapters.install(denoiser, LoraAdapter(rank=4, targets=["all"]), fresh.family)
        trained = adapters.trainable(denoiser)
        for parameter in trained.values():  # the second matrix starts at zero and would keep gradients from the first
            nn.init.normal_(parameter, std=0.1)
        prediction, target = predicted(fresh, denoiser, conditions)
        (prediction - target).square().mean().backward()
        assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
        assert [
            name
            for name, parameter in denoiser.named_parameters()
            if parameter.grad is not None and name not in trained
        ] == []


@pytest.mark.cell("lycoris")
def test_a_lokr_leaves_the_prediction_as_it_is_and_trains_on_every_target(fresh: Case) -> None:
    conditions = fresh.conditions(PROMPTS)
    for denoiser in fresh.denoisers.values():
        with torch.no_grad():
            base, _ = predicted(fresh, denoiser, conditions)
        adapters.install(denoiser, LokrAdapter(type="lokr", factor=2, targets=["all"]), fresh.family)
        prediction, target = predicted(fresh, denoiser, conditions)
        # A convolution rounds differently where gradients are wanted.
        torch.testing.assert_close(prediction, base, atol=1e-5, rtol=1e-5)
        (prediction - target).square().mean().backward()
        trained = adapters.trainable(denoiser)
        # The whole second factor starts at zero: it gets the gradient, the first one follows once it has moved.
        assert [name for name, p in trained.items() if name.endswith("lokr_w2") and not p.grad.any()] == []  # type: ignore[union-attr]
        others = [p for name, p in denoiser.named_parameters() if name not in trained]
        assert all(parameter.grad is None for parameter in others)


@pytest.mark.cell("full")
def test_full_rank_reaches_every_parameter_but_the_frozen_ones(fresh: Case) -> None:
    conditions = fresh.conditions(PROMPTS)
    for denoiser in fresh.denoisers.values():
        dead = tuple(f"{name}." for name in fresh.family.dead_modules(denoiser))
        adapters.install(denoiser, FullAdapter(type="full"), fresh.family)
        prediction, target = predicted(fresh, denoiser, conditions)
        (prediction - target).square().mean().backward()
        for name, parameter in denoiser.named_parameters():
            frozen = any(re.fullmatch(expression, name) for expression in fresh.family.frozen_parameters)
            assert (parameter.grad is None) == (frozen or name.startswith(dead)), name
            assert parameter.grad is None or parameter.ndim == 1 or parameter.grad.any(), name


@pytest.mark.cell("full")
def test_dead_modules_exist_and_their_output_is_thrown_away(fresh: Case) -> None:
    conditions = fresh.conditions(PROMPTS)
    for denoiser in fresh.denoisers.values():
        before, _ = predicted(fresh, denoiser, conditions)
        for name in fresh.family.dead_modules(denoiser):
            for parameter in denoiser.get_submodule(name).parameters():
                nn.init.normal_(parameter)
        after, _ = predicted(fresh, denoiser, conditions)
        assert torch.equal(before, after)


@pytest.mark.parametrize("preset", ["attention", "mlp", "all"])
def test_every_suffix_of_a_preset_names_layers_of_the_blocks(case: Case, preset: str) -> None:
    denoiser = next(iter(case.denoisers.values()))
    found = adapters.resolve_targets(denoiser, [preset], case.family)
    for suffix in case.family.lora_targets[preset]:
        assert [name for name in found if name.endswith(f".{suffix}")], suffix
    parts = tuple(f"{part.attribute}." for part in case.family.blocks)
    assert [name for name in found if not name.startswith(parts)] == []


@pytest.mark.cell("recompute")
def test_recomputing_activations_changes_neither_loss_nor_gradients(fresh: Case) -> None:
    conditions = fresh.conditions(PROMPTS)
    for denoiser in fresh.denoisers.values():
        adapters.install(denoiser, FullAdapter(type="full"), fresh.family)
        results = []
        for recompute in (False, True):
            denoiser.zero_grad()
            if recompute:
                denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            prediction, target = predicted(fresh, denoiser, conditions)
            loss = (prediction - target).square().mean()
            loss.backward()
            results.append(
                (
                    loss.detach(),
                    {name: p.grad.clone() for name, p in adapters.trainable(denoiser).items() if p.grad is not None},
                )
            )
        (loss_off, gradients_off), (loss_on, gradients_on) = results
        assert torch.equal(loss_off, loss_on)
        assert gradients_off.keys() == gradients_on.keys()
        for name, gradient in gradients_off.items():
            torch.testing.assert_close(gradient, gradients_on[name], atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.cell("overfits")
@pytest.mark.parametrize(
    ("adapter", "rate"),
    [(FullAdapter(type="full"), 1e-2), (LoraAdapter(rank=8, targets=["all"]), 2e-2)],
    ids=["full", "lora"],
)
def test_the_loss_falls_on_four_real_samples(fresh: Case, adapter: Any, rate: float) -> None:
    """By a fifth and for two steps in a row, within thirty steps."""
    name, denoiser = next(iter(fresh.denoisers.items()))
    stages = fresh.family.stages(fresh.pipeline_config, tuple(fresh.denoisers))
    stage = next(stage for stage in stages if stage.denoiser == name)
    levels = tuple(stage.low + (stage.high - stage.low) * share for share in (0.2, 0.4, 0.6, 0.8))
    conditions = fresh.conditions(["a palace", "a flower", "a roof", "petals"])
    noisy, time, target = fresh.noised(fresh.latents(4), levels)
    torch.manual_seed(0)
    adapters.install(denoiser, adapter, fresh.family)
    optimizer = torch.optim.AdamW(adapters.trainable(denoiser).values(), lr=rate, weight_decay=0.0, fused=True)
    losses: list[float] = []
    while len(losses) < 30 and not (losses and max(losses[-2:]) < 0.8 * losses[0]):
        loss = fresh.loss(fresh.family.predict(denoiser, noisy, time, conditions), target, conditions)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(losses[-2:]) < 0.8 * losses[0]


@pytest.mark.cell("bf16")
@torch.no_grad()
def test_a_bf16_forward_pass_is_close_to_fp32(case: Case, tmp_path: Path) -> None:
    if case.family.facts.needs_fp32:
        pytest.skip(f"bf16 is refused: {case.family.facts.needs_fp32}")
    save_tiny(case.name, tmp_path)
    conditions = case.conditions(PROMPTS)
    for name, exact in case.denoisers.items():
        half = components.load_denoiser(tmp_path, name, torch.bfloat16, torch.device("cpu"))
        assert {p.dtype for p in half.parameters()} >= {torch.bfloat16}
        expected, _ = predicted(case, exact, conditions)
        with torch.autocast("cpu", torch.bfloat16):
            actual, _ = predicted(case, half, conditions)
        assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.cell("export")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_program_of_the_report_loads_an_exported_lora_into_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    """With an alpha that is not the rank, which a loader that drops the metadata gets wrong."""
    case, base = shared_case(name), save_tiny(name, tmp_path / f"base-{name}")
    model = {"family": case.family.name, "source": str(base)}
    publish = {"formats": ["diffusers"]}
    lora = {"type": "lora", "rank": 4, "alpha": 9, "targets": ["all"]}
    result = trained(name, tmp_path, lora, model=model, publish=publish)
    files = export_lora(result.weights, result.file, case.family, tmp_path / "exports", provenance=PROVENANCE)
    pipe = shared_case(name).pipe
    load_as_reported(result, files, tmp_path, pipe)
    conditions = case.conditions(PROMPTS)
    for component, denoiser in result.denoisers.items():
        loaded, _ = predicted(case, getattr(pipe, component), conditions)
        expected, _ = predicted(case, denoiser, conditions)
        base_prediction, _ = predicted(case, case.denoisers[component], conditions)
        torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=1e-4)  # a tenth of what the LoRA does, and less
        assert (loaded - base_prediction).abs().max() > 1e-3


def test_blocks_are_lists_of_modules_that_return_the_streams_they_claim(case: Case) -> None:
    denoiser = next(iter(case.denoisers.values()))
    clean = case.latents(2)
    grid, patch = clean.shape[2:], case.family.facts.patch
    edges = grid[-1:] if case.family.facts.modality == "audio" else grid[-2:]
    tokens = (grid[0] if len(grid) == 3 else 1) * math.prod(-(-edge // patch) for edge in edges)
    tokens += sum(each[0, 0].numel() // patch**2 for each in case.conditions(PROMPTS).references)
    for part in case.family.blocks:
        blocks = denoiser.get_submodule(part.attribute)
        assert isinstance(blocks, nn.ModuleList)
        outputs = outputs_of(case, denoiser, blocks)
        # A family may call its denoiser once for each sample.
        assert len(outputs) in (len(blocks), len(blocks) * len(clean))
        for output in outputs:
            check_streams(part, output, tokens)


@torch.no_grad()
def outputs_of(case: Case, denoiser: nn.Module, blocks: nn.ModuleList) -> list[Any]:
    """What the blocks return in one forward pass."""
    seen: list[Any] = []
    handles = [block.register_forward_hook(lambda *hook: seen.append(hook[2])) for block in blocks]
    predicted(case, denoiser, case.conditions(PROMPTS))
    for handle in handles:
        handle.remove()
    return seen


def check_streams(part: Blocks, output: Any, tokens: int) -> None:
    if part.streams == "maps":
        first = output[0] if isinstance(output, tuple) else output
        assert first.ndim == 4
    elif "," in part.streams:
        assert len(output) == 2
        picture = output[part.streams.split(",").index("tokens")]
        assert picture.shape[1] == tokens
    elif "|" in part.streams:
        assert output.shape[1] > tokens
    elif part.streams == "text":
        assert output.ndim == 3
    else:
        assert output.shape[1] >= tokens
