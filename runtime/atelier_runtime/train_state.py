"""What a checkpoint holds: trained weights, optimizer state, moving average, step.

Everything else is a pure function of the seed and the step. No random state is kept: sample order, caption dropout, noise and noise
levels are drawn from (seed, step, slot), and torch's own generator is seeded from (seed, step, rank) at the start of every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from atelier_runtime.optimizers import Ema


@dataclass
class TrainState:
    """The trained parameters by full name (`<denoiser>.<parameter>`), their optimizer and moving average, and the steps done."""

    parameters: Mapping[str, Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0

    def tensors(self) -> dict[str, Any]:
        """The state as nested dicts of the live tensors and of numbers: what is saved, and what a resume loads into."""
        state: dict[str, Any] = {
            "step": self.step,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()},
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def restored(self, state: Mapping[str, Any]) -> None:
        """A resume has written into the tensors of `state`, which `tensors()` gave; take over its numbers."""
        self.step = int(state["step"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
