"""Diff2Flow (arXiv:2506.02221): a network that predicts epsilon or v, trained on the objective of flow matching.

x_t = a x0 + b eps is the point of the straight path at sigma = b / (a + b), times a + b. What the network predicts tells both ends of
the path, and with them a velocity p = eps' - x0', whose target is u = eps - x0. As x_t is given, an error of the prediction is one of
the velocity times a factor of the step alone:

    p - u = (a + b) / a (eps' - eps) = (a + b) (v' - v)

So the loss of flow matching is the network's own squared error times the square of that factor, and nothing is divided by an `a` that
is nearly 0. The network stays one of epsilon or v, and samples as before.
"""

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from atelier_runtime.family import Stage
from atelier_runtime.objectives.noise_schedules import BetaSchedule
from atelier_runtime.objectives.timesteps import SMALLEST_MASS, Density, no_mass, shift_sigma


def flow_sigma(alpha_bar: Tensor) -> Tensor:
    """Place b / (a + b) in [0, 1] on the straight path of steps with this share of the signal's power, of the same shape."""
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return b / (a + b)


def flow_weight(alpha_bar: Tensor, prediction: str, largest: float | None) -> Tensor:
    """What makes the squared error of epsilon or v that of the velocity, at most `largest`; of the shape of `alpha_bar`."""
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    weight = (a + b).square() if prediction == "v" else ((a + b) / a).square()
    return weight if largest is None else weight.clamp(max=largest)


class FlowTimes:
    """A schedule of betas whose steps are drawn as flow matching draws sigma: from a density and shifted by `k`.

    A sigma belongs to the step that is nearest on the straight path. So each step has the probability of the sigmas around it, and is
    drawn with that.
    """

    dtype = torch.long

    def __init__(self, schedule: BetaSchedule, density: Density, k: float) -> None:
        self._schedule = schedule
        sigmas = flow_sigma(schedule.alpha_bars.double()).tolist()
        between = ((low + high) / 2 for low, high in pairwise(sigmas))
        self._below = [0.0, *(density.cdf(shift_sigma(sigma, 1 / k)) for sigma in between), 1.0]

    @property
    def alpha_bars(self) -> Tensor:
        """Share of the signal's power at each step."""
        return self._schedule.alpha_bars

    @property
    def probabilities(self) -> Tensor:
        """Of each step, fp64; the sum is 1."""
        return torch.tensor(self._below, dtype=torch.float64).diff()

    def draw(self, stage: Stage, generator: torch.Generator) -> float:
        first, end = self._schedule.steps_of(stage)
        if self.mass(stage) < SMALLEST_MASS:
            raise no_mass([stage])
        below, up_to = self._below[first], self._below[end]
        uniform = 1 - float(torch.rand((), generator=generator, dtype=torch.float64))  # (0, 1]
        step = bisect_left(self._below, below + (up_to - below) * uniform) - 1
        return min(max(step, first), end - 1)  # only rounding can leave the range

    def mass(self, stage: Stage) -> float:
        first, end = self._schedule.steps_of(stage)
        return self._below[end] - self._below[first] if first < end else 0.0

    def alpha_bar(self, time: Tensor) -> Tensor:
        return self._schedule.alpha_bar(time)
