"""The steps of a slider in the trainer itself: their strength, their gradients, what a neutral one leaves alone, what is learnt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from atelier_api.run_file import RunFile
from atelier_runtime import launch, parallel
from atelier_runtime.adapters import at_strength
from atelier_runtime.reporter import History
from atelier_runtime.sampling import draw_samples
from atelier_runtime.trainer import Parts, Trainer, build_state
from family_models import save_tiny
from run_files import run_file
from runs import write_digits
from sessions import opened

pytestmark = pytest.mark.processes  # a session has a writer

ENDS = {"more": "1", "less": "-2", "plain": "0"}
DRAWN_AT: list[dict[str, str]] = [{}, *({"adapterStrength": strength} for strength in ("1", "0", "-1", "2"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3, and pictures for more, their negatives for twice as much less, and neutral ones: two each."""
    made = tmp_path_factory.mktemp("slider")
    save_tiny("sd3", made / "base")
    for name in ENDS:
        write_digits(made / name, 2)
    for path in (made / "less").glob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    return made


@pytest.fixture(scope="module", autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    parallel.stop()


@pytest.fixture(scope="module", params=[False], ids=["kept"])
def prepared(folder: Path, request: pytest.FixtureRequest) -> Parts:
    parts = launch.prepare(opened(slider_run(folder, f"recompute {request.param}", recompute=request.param)))
    parts.checkpointer.close()
    return parts


@pytest.fixture
def trainer(prepared: Parts) -> Trainer:
    """With an adapter that does something, and an optimizer that has done nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prepared.state.parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    hyperparameters, plan = prepared.run_file.spec.hyperparameters, prepared.run_file.plan
    state = build_state(prepared.denoisers, hyperparameters, plan, prepared.distributed)
    return Trainer(replace(prepared, state=state), lambda: False)


def slider_run(folder: Path, name: str, *, steps: int = 6, recompute: bool = False) -> RunFile:
    base = folder / "base"
    made = run_file(
        folder / name,
        model={"family": "sd3", "source": str(base)},
        adapter={"type": "lora", "rank": 4, "slider": True},
        data={
            "sources": [{"uri": str(folder / end), "sliderStrength": strength} for end, strength in ENDS.items()],
            "resolution": 32,
            "captions": {"dropout": "0"},
        },
        validation={"steps": 2, "prompts": [{"text": "a handwritten three"} | strength for strength in DRAWN_AT]},
        hyperparameters={"steps": steps, "globalBatchSize": 2, "precision": "fp32", "gradientClip": None},
    )
    changes = {"strategy": "single", "gradient_checkpointing": recompute, "threads_per_process": 1}
    changes |= {"micro_batch_size": 2, "learning_rate": 1e-2}
    plan = made.plan.model_copy(update=changes)
    return made.model_copy(update={"model_folder": str(base), "cache_uri": str(folder / "cache"), "plan": plan})


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer._parts.state.parameters.items()}


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    state: Any = trainer._parts.state
    optimizer: torch.optim.Optimizer = state.optimizer
    return optimizer


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    taken = gradients_kept(trainer)
    optimizer_of(trainer).zero_grad()
    return taken


def one_step(trainer: Trainer, step: int, micro_batch_size: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and the gradients that the optimizer is given in it."""
    parts = trainer._parts
    batch, optimizer = parts.dataset.order.batch(step), optimizer_of(trainer)
    slots = [batch.slots[first : first + micro_batch_size] for first in range(0, len(batch.slots), micro_batch_size)]
    seen: list[dict[str, Tensor]] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_kept(trainer)))
    [loss], _ = trainer._step(batch, [parts.dataset.load(each, step=step, epoch=0) for each in slots], lambda: None)
    handle.remove()
    return loss, seen[0] if seen else {}


def gradients_kept(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer._parts.state.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("prepared", [False, True], ids=["kept", "recomputed"], indirect=True)
@pytest.mark.parametrize("step", [0, 1], ids=["more", "less"])
def test_a_step_of_two_is_the_mean_of_the_two_alone_at_the_strength_of_its_sign(trainer: Trainer, step: int) -> None:
    parts = trainer._parts
    batch = parts.dataset.order.batch(step)
    assert batch.strength == [1.0, -2.0][step]
    stage = parts.denoisers.stages[0]
    denoiser = parts.denoisers.wrapped[stage.denoiser]
    losses, alone = [], []
    for slot in batch.slots:
        loaded = parts.dataset.load([slot], step=step, epoch=0)
        with at_strength([denoiser], batch.strength):
            loss = trainer._losses(denoiser, loaded, step, stage)[0]
            loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        alone.append(gradients(trainer))
    found, given = one_step(trainer, step)
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)
    assert given.keys() == parts.state.parameters.keys()
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, atol=1e-6, rtol=1e-4)


def test_the_signs_take_turns_and_a_neutral_step_moves_no_weight(trainer: Trainer) -> None:
    """Not by momentum and weight decay either, which the steps before have left."""
    moved = []
    for step in range(6):
        before = weights(trainer)
        one_step(trainer, step, micro_batch_size=1)
        moved.append(any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items()))
    assert moved == [True, True, False] * 2


def test_opposite_strengths_shift_what_is_predicted_towards_opposite_ends(trainer: Trainer) -> None:
    """Of a flow, whose target is the noise less the latents: as a part of the way from one end to the other, at equal noise."""
    parts = trainer._parts
    with torch.no_grad():
        for name, parameter in parts.state.parameters.items():
            if ".lora_B." in name:
                parameter.zero_()  # as a run starts
    stage = parts.denoisers.stages[0]
    denoiser = parts.denoisers.wrapped[stage.denoiser]
    more, less = (parts.dataset.load(parts.dataset.order.batch(end).slots, step=0, epoch=0) for end in (0, 1))
    way = less.latents.float().mean(0) - more.latents.float().mean(0)  # from the target of less to that of more
    seen: list[Tensor] = []

    def predicted(strength: float) -> Tensor:
        with torch.no_grad(), at_strength([denoiser], strength):
            for step in range(900, 904):  # at noise that no step trains on
                for loaded in (more, less):
                    trainer._losses(denoiser, loaded, step, stage)
        found = torch.cat(seen)
        seen.clear()
        return found

    with denoiser.register_forward_hook(lambda *given: seen.append(given[-1][0])):
        start = predicted(0.0)
    for step in range(24):
        one_step(trainer, step)
    with denoiser.register_forward_hook(lambda *given: seen.append(given[-1][0])):
        at = {strength: predicted(strength) for strength in (0.0, 1.0, -1.0, 2.0, -2.0)}
    assert torch.equal(at[0.0], start)
    shift = {s: float(((each - start) * way).sum((1, 2, 3)).mean() / way.square().sum()) for s, each in at.items()}
    assert shift[1.0] > 0.03
    assert shift[-1.0] == pytest.approx(-shift[1.0], rel=0.2)
    assert shift[2.0] == pytest.approx(2 * shift[1.0], rel=0.2)
    assert shift[-2.0] == pytest.approx(-2 * shift[1.0], rel=0.2)


def test_prompts_are_drawn_each_at_its_own_strength(trainer: Trainer) -> None:
    parts = trainer._parts

    def drawn() -> list[bytes]:
        pictures = draw_samples(parts.run_file, parts.family, dict(parts.denoisers.models), parts.distributed)
        return [pictures[index] for index in range(len(DRAWN_AT))]

    told_nothing, at_1, at_0, *others = drawn()
    assert told_nothing == at_1
    assert len({at_1, at_0, *others}) == len(DRAWN_AT) - 1
    with torch.no_grad():
        for name, parameter in parts.state.parameters.items():
            if ".lora_B." in name:
                parameter.zero_()
    assert set(drawn()) == {at_0}  # a new adapter changes nothing at any strength, and at 0 none does


def test_a_run_that_goes_on_has_the_steps_and_the_weights_of_one_that_was_never_stopped(folder: Path) -> None:
    """Stopped behind a neutral step, which leaves nothing in the optimizer."""
    straight = trained(slider_run(folder, "straight", steps=5))
    trained(slider_run(folder, "broken", steps=3))
    resumed = trained(slider_run(folder, "broken", steps=5))
    assert history(resumed) == history(straight)
    one, other = (flattened(parts.state.tensors()) for parts in (resumed, straight))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(plan: RunFile) -> Parts:
    parts = launch.prepare(opened(plan))
    try:
        parts.reporter.training(parts.state.step)
        assert Trainer(parts, lambda: False).run(lambda _: None)
    finally:
        parts.checkpointer.close()
    return parts


def history(parts: Parts) -> list[list[float]]:
    """Step, loss and norm of each step."""
    stored = Path(parts.run_file.store_uri) / "logs/history.jsonl"
    return [row[:3] for row in History.from_bytes(stored.read_bytes(), before_step=5).rows]


def flattened(state: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(state, dict):
        return {key: value for name, each in state.items() for key, value in flattened(each, f"{path}/{name}").items()}
    return {path: torch.as_tensor(state)}


def test_a_step_that_fails_leaves_the_adapter_at_its_own_strength(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = trainer._parts
    stage = parts.denoisers.stages[0]
    denoiser = parts.denoisers.wrapped[stage.denoiser]
    loaded = parts.dataset.load(parts.dataset.order.batch(1).slots, step=1, epoch=0)

    def loss() -> Tensor:
        with torch.no_grad():
            return trainer._losses(denoiser, loaded, 1, stage)[0]

    before = loss()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "backward", lambda *_: pytest.fail("in the backward pass"))
        with pytest.raises(pytest.fail.Exception, match="in the backward pass"):
            one_step(trainer, 1)
    assert torch.equal(loss(), before)
    with at_strength([denoiser], -2.0):
        assert not torch.equal(loss(), before)
