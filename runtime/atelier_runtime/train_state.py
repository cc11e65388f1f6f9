"""What a checkpoint holds: trained weights, optimizer state, moving average, step. Everything else is a pure function of the seed and the step.

No random state is kept: sample order, caption dropout, noise and noise levels are drawn from (seed, step, slot), and torch's own
generator is seeded from (seed, step, rank) at the start of every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
        """The state as nested dicts of tensors and numbers, for saving and as the template that a resume fills in place."""
        state: dict[str, Any] = {
            "step": self.step,
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": {name: dict(self._moments(parameter)) for name, parameter in self.parameters.items()},
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over `state`, which `tensors()` made and a resume has filled."""
        self.step = int(state["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
                for key, value in state["optimizer"][name].items():
                    self.optimizer.state[parameter][key] = value
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def _moments(self, parameter: Parameter) -> dict[str, Tensor]:
        """The optimizer's state of one parameter, made now if no step has made it: a resume needs something to load into."""
        moments = self.optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.tensor(0.0)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        return moments
