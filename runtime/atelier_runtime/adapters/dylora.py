"""DyLoRA (arXiv:2210.07558): a LoRA of which every prefix of ranks is an adapter of its own. A module of lycoris-lora.

A step draws one block of ranks, uses it and those before it, scaled by alpha / ranks in use, and trains the drawn one alone (the
paper's algorithm 1, with what is before it frozen). Its result is a file like any other of LoCon, which can be cut.

The library's own DyLoRA is not used. Each of its modules draws a block by Python's generator anew in each forward pass, also while
recomputing and sampling; blocks that are not drawn get no gradient, which DDP takes for a mistake; its alpha / blocks in use is not
what readers of its files compute; and each rank is a parameter of its own.
"""

from dataclasses import dataclass

import torch
from lycoris.functional.locon import bypass_forward_diff
from lycoris.modules.locon import LoConModule
from torch import Tensor


@dataclass
class DrawnBlock:
    """The block of ranks that all modules of a denoiser train in a step. Before the first draw it is the last one."""

    count: int
    index: int

    def draw(self, generator: torch.Generator) -> None:
        """Draw the block of the next step, each with the same probability."""
        self.index = int(torch.randint(self.count, (), generator=generator))


class Dylora(LoConModule):
    """The library's LoCon, cut to the block drawn while it trains; whole in evaluation."""

    drawn: DrawnBlock

    def bypass_forward_diff(self, x: Tensor, scale: float = 1) -> Tensor:
        """[..., inputs] to [..., outputs], to be added to the layer's output."""
        if not self.training:
            whole: Tensor = super().bypass_forward_diff(x, scale)
            return whole
        size = self.lora_dim // self.drawn.count
        below = self.drawn.index * size
        used = below + size
        down, up = self.lora_down.weight, self.lora_up.weight
        down = torch.cat([down[:below].detach(), down[below:used]])
        up = torch.cat([up[:, :below].detach(), up[:, below:used]], dim=1)
        gamma = scale * self.scale * self.lora_dim / used  # `self.scale` is alpha / all ranks
        geometry = {key: getattr(self.lora_down, key) for key in ("stride", "padding")} if self.isconv else {}
        difference: Tensor = bypass_forward_diff(x, None, down.to(x), up.to(x), None, gamma=gamma, extra_args=geometry)
        return difference * self.scalar.to(difference)
