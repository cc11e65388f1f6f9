"""torch's fused AdamW without its looks at every parameter in every step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from atelier_runtime.optimizers.moments import initial_state
from atelier_runtime.optimizers.shards import any_sharded, local


@dataclass(frozen=True)
class _Listed:
    """What a step of one parameter group works on, in the order of its parameters. `steps` are the elements of `ages` [n].

    Moments are this rank's parts. Weights of sharded parameters are not kept: FSDP may give a parameter other memory.
    """

    parameters: list[Parameter]
    sharded: bool
    first_moments: list[Tensor]
    second_moments: list[Tensor]
    ages: Tensor
    steps: list[Tensor]


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with fused=True, equal to it to the bit, for parameters of one dtype and device per group.

    The lists that the kernel takes are made once, since making them costs more than the kernel where there are many small matrices.
    They are made again after `load_state_dict`, a cleared state or a new group; whoever puts other tensors into the state of a
    parameter that has been trained must do so through `load_state_dict`. All parameters of a group, or none, are sharded; shards
    are stepped as the plain tensors that they are.
    """

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], **defaults: Any) -> None:
        """`defaults`: lr, betas, eps and weight_decay. The state is there from the start."""
        self._listed: list[_Listed] = []
        super().__init__(params, fused=True, **defaults)
        self._step_supports_amp_scaling = False  # a GradScaler must unscale the gradients itself
        self._listed = self._list_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for all parameters that have a gradient. A closure is not supported."""
        if closure is not None:
            raise ValueError("FusedAdamW takes no closure")
        if len(self.state) != sum(len(listed.parameters) for listed in self._listed):
            self._listed = self._list_groups()
        for group, listed in zip(self.param_groups, self._listed, strict=True):
            _step_group(group, listed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer; the state of the new parameters is made at the next step."""
        super().add_param_group(param_group)
        self._listed = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict` and when unpickled: the tensors of the state are other ones now."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._listed = []

    def _list_groups(self) -> list[_Listed]:
        """The lists of all groups. Makes the state of parameters that have none."""
        return [self._list(group["params"]) for group in self.param_groups]

    def _list(self, parameters: list[Parameter]) -> _Listed:
        kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
        if len(kinds) > 1:
            raise ValueError(f"a group of FusedAdamW is of one device and dtype, not of {sorted(map(str, kinds))}")
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = initial_state(parameter, parameter.device)
        states = [self.state[parameter] for parameter in parameters]
        # The ages lie in one vector, so that one addition raises them all; the state keeps its elements.
        ages = torch.stack([state["step"] for state in states])
        steps = list(ages.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        return _Listed(
            list(parameters),
            any_sharded(parameters),
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            ages,
            steps,
        )


def _step_group(group: dict[str, Any], listed: _Listed) -> None:
    found = [parameter.grad for parameter in listed.parameters]
    gradients: list[Tensor] = [gradient for gradient in found if gradient is not None]
    if not gradients:
        return
    weights: list[Tensor] = list(listed.parameters)
    first_moments, second_moments, steps = listed.first_moments, listed.second_moments, listed.steps
    if len(gradients) == len(found):
        listed.ages.add_(1)
    else:
        trained = [gradient is not None for gradient in found]
        weights, first_moments, second_moments, steps = (
            list(compress(column, trained)) for column in (weights, first_moments, second_moments, steps)
        )
        torch._foreach_add_(steps, 1)
    if listed.sharded:
        weights, gradients = [local(weight) for weight in weights], [local(gradient) for gradient in gradients]
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        weights,
        gradients,
        first_moments,
        second_moments,
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
