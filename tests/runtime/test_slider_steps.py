"""The steps of a slider in the trainer itself: their strength, their gradients, and what a neutral one leaves alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier_api.run_file import RunFile
from atelier_runtime import launch, parallel
from atelier_runtime.adapters import at_strength
from atelier_runtime.trainer import Trainer
from family_models import save_tiny
from run_files import run_file
from runs import write_digits

pytestmark = pytest.mark.processes  # the checkpointer starts its writer

ENDS = {"more": "1", "less": "-2", "plain": "0"}


@pytest.fixture
def trainer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    plan = slider_run(tmp_path, recompute=getattr(request, "param", False))
    parts = launch.prepare(launch.open_session(plan, parallel.start(plan.plan), launch.StopFlag()))
    parts.checkpointer.close()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parts.state.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    yield Trainer(parts, lambda: False)
    parallel.stop()


def slider_run(folder: Path, *, recompute: bool) -> RunFile:
    """SD3 on three sources of two pictures: for more, for twice as much less, and neutral."""
    base = save_tiny("sd3", folder / "base")
    sources = [
        {"uri": str(write_digits(folder / name, 2)), "sliderStrength": strength} for name, strength in ENDS.items()
    ]
    made = run_file(
        folder,
        model={"family": "sd3", "source": str(base)},
        adapter={"type": "lora", "rank": 4, "slider": True},
        data={"sources": sources, "resolution": 32, "captions": {"dropout": "0"}},
        hyperparameters={"steps": 6, "globalBatchSize": 2, "precision": "fp32", "gradientClip": None},
    )
    changes = {"strategy": "single", "gradient_checkpointing": recompute, "threads_per_process": 1}
    return made.model_copy(update={"model_folder": str(base), "plan": made.plan.model_copy(update=changes)})


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer._parts.state.parameters.items()}


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    taken = {name: p.grad.clone() for name, p in trainer._parts.state.parameters.items() if p.grad is not None}
    trainer._parts.state.optimizer.zero_grad()
    return taken


def one_step(trainer: Trainer, step: int, micro_batch_size: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and the gradients that the optimizer is given in it."""
    parts = trainer._parts
    batch, optimizer = parts.dataset.order.batch(step), parts.state.optimizer
    slots = [batch.slots[first : first + micro_batch_size] for first in range(0, len(batch.slots), micro_batch_size)]
    seen: list[dict[str, Tensor]] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_kept(trainer)))
    loss, _ = trainer._step(batch, [parts.dataset.load(each, step=step, epoch=0) for each in slots], lambda: None)
    handle.remove()
    return loss, seen[0] if seen else {}


def gradients_kept(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer._parts.state.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("trainer", [False, True], ids=["kept", "recomputed"], indirect=True)
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
            loss = trainer._loss(denoiser, loaded, step, stage)
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


def test_a_step_that_fails_leaves_the_adapter_at_its_own_strength(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = trainer._parts
    stage = parts.denoisers.stages[0]
    denoiser = parts.denoisers.wrapped[stage.denoiser]
    loaded = parts.dataset.load(parts.dataset.order.batch(1).slots, step=1, epoch=0)

    def loss() -> Tensor:
        with torch.no_grad():
            return trainer._loss(denoiser, loaded, 1, stage)

    before = loss()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "backward", lambda *_: pytest.fail("in the backward pass"))
        with pytest.raises(pytest.fail.Exception, match="in the backward pass"):
            one_step(trainer, 1)
    assert torch.equal(loss(), before)
    with at_strength([denoiser], -2.0):
        assert not torch.equal(loss(), before)
