"""The denoiser of a run as objectives ask it: for the pass that trains, and for passes beside it that only look.

The trainer makes one `RunNetwork` and says before each micro-batch which denoiser is asked and what it is told. All ranks must ask
equally often: where weights are sharded each pass is a collective.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from atelier_runtime.family import Conditions, Family


class RunNetwork:
    """`denoiser` is as the strategy calls it. `contrast` are the conditions with the empty caption, where the objective wants them."""

    denoiser: nn.Module
    conditions: Conditions
    contrast: Conditions | None = None

    def __init__(
        self,
        family: Family,
        watching: Sequence[Callable[[], AbstractContextManager[None]]],
        *,
        bf16: bool,
        device: torch.device,
        averaged: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`watching` give contexts for the pass that trains, `averaged` one in which the weights are their moving average."""
        self._family = family
        self._watching = watching
        self._autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else None
        self._cuda = device if device.type == "cuda" else None
        self.averaged = averaged

    def predict(self, noisy: Tensor, time: Tensor) -> Tensor:
        """The prediction that is trained: gradients go through it, and techniques watch it."""
        if self._autocast is None and not self._watching:
            return self._family.predict(self.denoiser, noisy, time, self.conditions)
        with ExitStack() as stack:
            for watching in self._watching:
                stack.enter_context(watching())
            if self._autocast is not None:
                stack.enter_context(self._autocast)
            return self._family.predict(self.denoiser, noisy, time, self.conditions)

    @torch.no_grad()
    def look(self, noisy: Tensor, time: Tensor, conditions: Conditions | None = None) -> Tensor:
        """A prediction without gradient that no technique watches, fp32; of the micro-batch's own conditions unless told."""
        with ExitStack() as stack:
            if self._autocast is not None:
                stack.enter_context(self._autocast)
            return self._family.predict(self.denoiser, noisy, time, conditions or self.conditions).float()

    def draws(self) -> list[Tensor]:
        """State of torch's own generators, from which dropout draws."""
        states = [torch.get_rng_state()]
        return states if self._cuda is None else [*states, torch.cuda.get_rng_state(self._cuda)]

    def draw_again(self, states: Sequence[Tensor]) -> None:
        """Let the next pass draw what one at the time of `draws` would have."""
        torch.set_rng_state(states[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(states[1], self._cuda)
