"""What AdamW keeps of each parameter."""

import torch
from torch import Tensor


def initial_state(parameter: Tensor, step_device: torch.device) -> dict[str, Tensor]:
    """The state of a parameter before its first step, under the names of `torch.optim.AdamW`."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
