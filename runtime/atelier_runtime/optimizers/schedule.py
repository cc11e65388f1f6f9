"""The learning rate of each step, as a pure function: nothing to save, nothing to restore."""

import math

from atelier_api.v1alpha1.hyperparameters import Hyperparameters


def learning_rate_at(step: int, hyperparameters: Hyperparameters, peak: float) -> float:
    """The rate of the optimizer step that follows `step` finished ones (0 to steps - 1).

    Warm-up of w steps: peak (step + 1) / (w + 1), so that the first step already moves and step w is the first at the peak. From
    there p goes from 0 to 1 at the last step, and the rate is peak (end + (1 - end) f(p)) with f(p) = 1 - p (linear),
    (1 + cos pi p) / 2 (cosine), (1 - p)^power (polynomial). Steps after the last keep its rate.
    """
    schedule = hyperparameters.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    falling_steps = hyperparameters.steps - 1 - schedule.warmup_steps
    if schedule.type == "constant" or falling_steps <= 0:
        return peak
    progress = min((step - schedule.warmup_steps) / falling_steps, 1.0)
    if schedule.type == "linear":
        remaining = 1 - progress
    elif schedule.type == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    else:
        remaining = (1 - progress) ** schedule.power
    return peak * (schedule.end + (1 - schedule.end) * remaining)
