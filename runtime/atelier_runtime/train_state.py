"""What a checkpoint holds: trained weights, optimizer state, moving average, step.

Everything else is a pure function of the seed and the step. No random state is kept: sample order, caption dropout, noise and noise
levels are drawn from (seed, step, slot), and torch's own generator is seeded from (seed, step, rank) at the start of every step.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from atelier_runtime.optimizers import Ema, clip_gradients


class State(Protocol):
    """The trained parameters by full name (`<denoiser>.<parameter>`), their optimizer and moving average, and the steps done."""

    step: int

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...

    def update(self, denoiser: str, learning_rate: float) -> Tensor:
        """One optimizer step with the gradients that the denoiser's parameters have. Gives their norm before clipping."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their moving average where there is one."""

    def tensors(self) -> dict[str, Any]:
        """The state as nested dicts of tensors and numbers: what is saved, and what a resume loads into. Collective."""

    def restored(self, state: Mapping[str, Any]) -> None:
        """A resume has written into the tensors of `state`, which `tensors()` gave; take them over. Collective."""


@dataclass
class TrainState:
    """The state where torch's parameters hold what is trained: whole or, under FSDP, as DTensors."""

    parameters: Mapping[str, Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    gradient_clip: float | None = None

    def update(self, denoiser: str, learning_rate: float) -> Tensor:
        """One optimizer step. Parameters of other denoisers have no gradients, and stay."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = clip_gradients(self.parameters.values(), self.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average where there is one."""
        if self.ema is None:
            yield
        else:
            with self.ema.swapped():
                yield

    def tensors(self) -> dict[str, Any]:
        """The state; its tensors are the live ones."""
        state: dict[str, Any] = {
            "step": self.step,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()},
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def restored(self, state: Mapping[str, Any]) -> None:
        """Take over the numbers; the tensors are the live ones."""
        self.step = int(state["step"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
