"""Exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atelier_runtime.optimizers.shards import local


class Ema:
    """average <- d average + (1 - d) weight with d = min(decay, (1 + n) / (10 + n)), n the number of updates before.

    The average is fp32 whatever the weights are: in bf16 a step of 1 - d would round to nothing. It is sharded as the weights are
    and lives on their device.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._updates = 0
        self._averages = {name: _fp32_copy(parameter) for name, parameter in self._parameters.items()}

    @property
    def decay(self) -> float:
        """The decay that the next update uses."""
        return min(self._decay, (1 + self._updates) / (10 + self._updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now. Once per optimizer step."""
        weights = [local(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_([local(average) for average in self._averages.values()], weights, 1 - self.decay)
        self._updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The weights are the average inside, and are put back to the bit at the end, also after an exception."""
        weights = [local(parameter) for parameter in self._parameters.values()]
        with torch.no_grad():
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, [local(average) for average in self._averages.values()])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)

    def state_dict(self) -> dict[str, Any]:
        """`updates` and the averages by parameter name. The tensors are the live ones: loading may write into them."""
        return {"updates": self._updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same parameters. Raises ValueError when the names differ."""
        averages: Mapping[str, Tensor] = state["averages"]
        if averages.keys() != self._averages.keys():
            different = sorted(averages.keys() ^ self._averages.keys())
            raise ValueError(f"the moving average is of other parameters: {', '.join(different[:5])}")
        for name, average in self._averages.items():
            average.copy_(averages[name])
        self._updates = int(state["updates"])


def _fp32_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().clone().float()
