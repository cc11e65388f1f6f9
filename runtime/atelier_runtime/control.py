"""Control networks (ControlNet, arXiv:2302.05543): what differs between their kinds, and a frozen base together with one.

A control network is a copy of the base's first blocks. It sees what the base sees and a conditioning picture beside it, and what comes
out of its blocks is added to what goes through the base. Its outputs start at zero, so that at its start it changes nothing.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

CONTROL_NETWORK = "controlnet"
"""Its component in the stock pipelines."""


class Control(ABC):
    """One kind of control network. It has no state."""

    pipeline: ClassVar[str]
    """Class in diffusers, or ours, that samples with a control network."""
    network: ClassVar[str]
    """Class in diffusers, or ours, of the network."""
    picture: ClassVar[str]
    """The argument of the pipeline that takes the conditioning picture."""
    takes: ClassVar[Literal["pixels", "latents"]]
    """What the network is given of it: pixels [B, 3, H, W] in [0, 1], or what `Family.encode_condition` makes."""
    drawn: ClassVar[bool] = True
    """Whether the pipeline draws latents of the picture from their posterior; else it takes the mean."""
    lists: ClassVar[tuple[str, ...]] = ()
    """Lists of repeated blocks of the network, beside those that the base has by the same name."""

    @abstractmethod
    def copied(self, base: nn.Module) -> nn.Module:
        """A new network in fp32 on the CPU: blocks of `base`, outputs of zeros. What is drawn, is by torch's global generator."""

    def unused(self, network: nn.Module) -> tuple[str, ...]:
        """Full names of modules and parameters of the network that cannot change what comes out: no gradient reaches them."""
        return ()

    @abstractmethod
    def predict(
        self, base: nn.Module, network: nn.Module, condition: Tensor, scale: float, *given: Any, **named: Any
    ) -> Any:
        """What `base` gives for the arguments `given` and `named` with the outputs of `network`, times `scale`, in their places."""


def copied_blocks(blocks: int, most: int) -> int:
    """How many of a base's first blocks are copied: `most`, or fewer, so that each output has a place in the base.

    Output i // ceil(blocks / outputs) is added behind block i of the `blocks`.
    """
    return math.ceil(blocks / math.ceil(blocks / most))


def with_plain_config(base: Any) -> Any:
    """`base` as diffusers' `from_transformer` may read it: with a config of its own, which that function writes to, and in which no
    value is marked as a default of the base's class, since it would take the default of the network's class in its place."""
    source = copy.copy(base)
    source._internal_dict = {name: value for name, value in base.config.items() if name != "_use_default_values"}
    return source


class Controlled(nn.Module):
    """A base and its control network, called like the base with the condition beside: `control`, and how much it counts."""

    def __init__(self, base: nn.Module, network: nn.Module, kind: Control) -> None:
        super().__init__()
        self.base = base
        self.network = network
        self._kind = kind

    @property
    def config(self) -> Any:
        """The diffusers config of the base."""
        return self.base.config

    def forward(self, *given: Any, control: Tensor, scale: float = 1.0, **named: Any) -> Any:
        return self._kind.predict(self.base, self.network, control, scale, *given, **named)
