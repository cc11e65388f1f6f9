"""AdamW with bf16 weights and moments, rounded stochastically.

Rounding to nearest loses every update smaller than half a bf16 step (2^-9 of the weight): weights stand still at small learning
rates, and the second moment, which moves by 1 - beta2 = 0.001 of itself, does too. Stochastic rounding goes up or down with
probabilities that make the expected value exact (arXiv:2010.06192, section 4).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from atelier_runtime.optimizers.moments import initial_state
from atelier_runtime.optimizers.shards import is_sharded, local, shard_index

ELEMENTS_AT_ONCE = 1 << 24
"""Elements worked on together: few kernel launches for many small tensors, under half a GiB of fp32 for large ones."""


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101), each step computed in fp32. The state has the names of `torch.optim.AdamW`.

    The random numbers depend on (seed, step, place of the parameters) only, so a resumed run goes on to the bit, and ranks that
    hold the same weights round them alike. Parameters that are fp32 (modules a model keeps in fp32) stay so, with fp32 moments.
    """

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], *, seed: int, **defaults: Any) -> None:
        """`defaults`: lr, betas, eps and weight_decay, as for `torch.optim.AdamW`."""
        super().__init__(params, defaults)
        self._seed = seed
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = initial_state(parameter, torch.device("cpu"))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for all parameters that have a gradient. A closure is not supported."""
        if closure is not None:
            raise ValueError("AdamWBf16 takes no closure")
        first = 0
        for group in self.param_groups:
            for batch in self._batches(group["params"]):
                self._step_batch(group, batch, first)
                first += len(batch)

    def _batches(self, parameters: list[Parameter]) -> Iterator[list[Parameter]]:
        """Runs of parameters that can be laid end to end: same dtype, age and sharding, and not too many elements."""
        batch: list[Parameter] = []
        elements = 0
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = initial_state(parameter, torch.device("cpu"))
            if batch and (self._kind(parameter) != self._kind(batch[0]) or elements > ELEMENTS_AT_ONCE):
                yield batch
                batch, elements = [], 0
            batch.append(parameter)
            elements += local(parameter).numel()
        if batch:
            yield batch

    def _kind(self, parameter: Parameter) -> tuple[Any, ...]:
        return parameter.device, parameter.dtype, is_sharded(parameter), float(self.state[parameter]["step"])

    def _step_batch(self, group: dict[str, Any], parameters: list[Parameter], place: int) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        step = int(states[0]["step"])
        (beta1, beta2), rate = group["betas"], float(group["lr"])
        weights = [local(parameter) for parameter in parameters]
        firsts = [local(state["exp_avg"]) for state in states]
        seconds = [local(state["exp_avg_sq"]) for state in states]

        gradient = _flat([local(parameter.grad) for parameter in parameters if parameter.grad is not None])
        first = _flat(firsts).lerp_(gradient, 1 - beta1)
        second = _flat(seconds).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight = _flat(weights).mul_(1 - rate * group["weight_decay"])
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.addcdiv_(first, denominator, value=-rate / (1 - beta1**step))

        generator = _generator(weight.device, (self._seed, step, place, shard_index(parameters[0])))
        for targets, values in ((firsts, first), (seconds, second), (weights, weight)):
            _store(targets, values, generator)


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values as bf16, up or down at random so that the expected value is the value. bf16 numbers and non-finite ones stay.

    bf16 is the upper half of fp32's bits: adding a uniform 16-bit number carries into it with the probability of the lower half.
    """
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    upper = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), upper, values).bfloat16()


def _flat(tensors: list[Tensor]) -> Tensor:
    """A new fp32 vector of all elements."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).float()


def _store(targets: list[Tensor], values: Tensor, generator: torch.Generator) -> None:
    if targets[0].dtype == torch.bfloat16:
        values = stochastic_round(values, generator)
    pieces = torch.split(values, [target.numel() for target in targets])
    torch._foreach_copy_(targets, [piece.view(target.shape) for piece, target in zip(pieces, targets, strict=True)])


def _generator(device: torch.device, key: tuple[Any, ...]) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
