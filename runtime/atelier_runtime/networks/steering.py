"""Control networks for transformers that take no outputs of one: copies of a base's first blocks, and how they steer it.

Such a network is called in the middle of the base's own pass and told what the base tells its first block, so embedders and positions
are the base's alone. What comes out is added to the tokens of the picture behind blocks of the base. Both happen outside of what is
recomputed: within it the network would run again in the backward pass, which DDP does not allow.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

Call = dict[str, Any]
"""The arguments of a forward pass by name."""
Behind = Callable[[int, tuple[Any, ...], Call, Any], Any]
"""(number of a block, its arguments by place and by name, its output) to what is to be its output."""


class SteeringModel(ModelMixin, ConfigMixin):
    """What `steering` asks of a network, whose forward pass gives [B, tokens, width] for each copied block."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing: bool

    @classmethod
    def from_transformer(cls, base: Any) -> "SteeringModel":
        """A new one in fp32 on the CPU: blocks of `base`, and zeros where it gets in and out. Raises ValueError where it has none."""
        raise NotImplementedError

    @property
    def unused(self) -> tuple[str, ...]:
        """Full names of modules that cannot change what comes out."""
        return ()

    def steered_blocks(self, base: Any) -> list[nn.Module]:
        """Blocks of the base behind which something is added, in order: output i // ceil(blocks / outputs) behind block i."""
        raise NotImplementedError

    def told(self, base: Any, asked: Call, first: Call, output: Any, condition: Tensor) -> Call:
        """The network's arguments. `asked` are those of the base, `first` those of its first block, which gave `output`.

        `condition` [B, C, H, W] is as large as the noisy latents.
        """
        raise NotImplementedError

    def joined(self, output: Any, addition: Tensor) -> Any:
        """What comes out of a block of the base, with the addition [B, tokens, width] to the tokens of the picture."""
        raise NotImplementedError

    def called(self, block: nn.Module, *given: Any) -> Any:
        """What comes out of a block of this network, whose activations are computed again where that is switched on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *given)
        return block(*given)


@contextmanager
def steering(base: Any, network: Any, condition: Callable[[Tensor], Tensor], scale: float) -> Iterator[None]:
    """Within it each call of `base` is steered by `network`, whose outputs count `scale` times.

    `condition` gives the latents of the conditioning pictures, [B, C, H, W], for the noisy ones that the base is called with. Both
    models may be spread over ranks, the network by DDP too.
    """
    blocks = network.steered_blocks(base)
    asked: Call = {}
    outputs: list[Tensor] = []

    def enter(_: nn.Module, given: tuple[Any, ...], named: Call) -> None:
        asked.clear()
        asked.update(_by_name(base, given, named))

    def behind(number: int, given: tuple[Any, ...], named: Call, output: Any) -> Any:
        if number == 0:
            first = _by_name(blocks[0], given, named)
            told = network.told(base, asked, first, output, condition(asked["hidden_states"]))
            outputs[:] = [scale * each for each in network(**told)]
        return network.joined(output, outputs[number // math.ceil(len(blocks) / len(outputs))])

    with ExitStack() as stack:
        stack.callback(base.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.enter_context(_changed(base, blocks, behind))
        yield


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer of zeros: where a network gets in and out, so that it changes nothing at its start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@contextmanager
def _changed(base: Any, blocks: Sequence[nn.Module], behind: Behind) -> Iterator[None]:
    """Within it `behind` has the last word on what comes out of `blocks` in a pass of `base`, once in each pass."""
    if torch.is_grad_enabled() and base.gradient_checkpointing:
        recomputed = base._gradient_checkpointing_func
        numbers = {id(block): number for number, block in enumerate(blocks)}

        def outside(block: nn.Module, *given: Any) -> Any:
            output = recomputed(block, *given)
            return behind(numbers[id(block)], given, {}, output) if id(block) in numbers else output

        base._gradient_checkpointing_func = outside
        try:
            yield
        finally:
            base._gradient_checkpointing_func = recomputed
        return

    def hook(number: int) -> Callable[[nn.Module, tuple[Any, ...], Call, Any], Any]:
        return lambda _, given, named, output: behind(number, given, named, output)

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(hook(number), with_kwargs=True).remove)
        yield


def _by_name(module: nn.Module, given: tuple[Any, ...], named: Call) -> Call:
    return inspect.signature(module.forward).bind(*given, **named).arguments
