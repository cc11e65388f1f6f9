"""Training that is broken off after every step and goes on from what it has saved, under one strategy after another."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from atelier_api.run_file import RunFile
from atelier_runtime import parallel
from atelier_runtime.checkpoint import Checkpointer, WriterProcess, resume
from atelier_runtime.store import open_store
from training_ranks import Case, Training, plan_of


@dataclass(frozen=True)
class Leg:
    """Where a leg of a relay came to. `weights` on rank 0 alone."""

    step: int
    loss: float
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


@dataclass(frozen=True)
class Relay:
    """Strategies that follow each other, a step each; the first goes on from the newest checkpoint in the store, if there is one."""

    strategies: Sequence[str]
    case: Case
    run_file: RunFile
    staging: Path


def straight(strategy: str, case: Case, steps: int) -> list[Leg]:
    """The same without a break, in one process."""
    parallel.start(plan_of(strategy, 1, case))
    try:
        return _straight(strategy, case, steps)
    finally:
        parallel.stop()


def relays(
    world: int, relay: Relay, alone: Sequence[str] = (), case: Case | None = None
) -> tuple[list[Leg], dict[str, tuple[list[Leg], list[Leg]]]]:
    """The legs of a relay; and for each strategy of `alone` those of three steps with breaks, kept in memory, and without."""
    writer = WriterProcess(relay.staging.parent)
    distributed = parallel.start(plan_of(relay.strategies[0], world, relay.case))
    try:
        after_itself = {}
        for strategy in alone:
            assert case is not None
            after_itself[strategy] = (_in_memory([strategy] * 3, case), _straight(strategy, case, 3))
        return _through_the_store(relay, distributed, writer), after_itself
    finally:
        parallel.stop()


def _straight(strategy: str, case: Case, steps: int) -> list[Leg]:
    training = Training(strategy, case)
    return [_leg(training) for _ in range(steps)]


def _in_memory(strategies: Sequence[str], case: Case) -> list[Leg]:
    legs = []
    saved: Any = None
    for strategy in strategies:
        training = Training(strategy, case)
        if saved is not None:
            template = training.state.tensors()
            training.state.restored(_loaded(template, saved))
        legs.append(_leg(training))
        saved = training.state.tensors()
    return legs


def _through_the_store(relay: Relay, distributed: parallel.Distributed, writer: WriterProcess) -> list[Leg]:
    run_file, staging = relay.run_file, relay.staging
    store = open_store(run_file.store_uri, run_file.spec.storage.s3)
    checkpointer = Checkpointer(run_file, distributed, store, staging, writer=writer)
    legs = []
    with ExitStack() as stack:
        stack.callback(checkpointer.close)
        for strategy in relay.strategies:
            training = Training(strategy, relay.case)
            template = training.state.tensors()
            if resume(run_file, distributed, store, template, staging) is not None:
                training.state.restored(template)
            legs.append(_leg(training))
            checkpointer.save(training.state.step, training.state.tensors())
            checkpointer.wait()
            assert [outcome.error for outcome in checkpointer.poll()] == [None]
    return legs


def _leg(training: Training) -> Leg:
    loss, _ = training.step()
    return Leg(training.state.step, loss, training.weights(), training.averages())


def _loaded(template: Any, saved: Any) -> Any:
    """The template, as a resume fills it: its tensors written to, its numbers replaced."""
    if isinstance(template, dict):
        assert template.keys() == saved.keys()
        return {key: _loaded(value, saved[key]) for key, value in template.items()}
    return template.copy_(saved) if isinstance(template, Tensor) else saved
