"""How the noise level of a flow sample is drawn: a density over sigma, a shift, and the range that a denoiser is responsible for.

sigma is in (0, 1], 1 is noise. Everything here is scalar fp64 arithmetic on the CPU: one uniform number per sample goes through the
inverse CDF of the density cut to the range, then through the shift. Truncation keeps the density's shape inside the range; clamping
would pile its tails up on the ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal, Protocol

import numpy
import torch

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.objective import Timesteps
from atelier_runtime.family import Stage

SMALLEST_MASS = 1e-9
"""A range with less probability than this is not trained on: fp64 has no digits left to draw from it fairly."""


class Density(Protocol):
    """A density of sigma on [0, 1], before the shift."""

    def cdf(self, sigma: float) -> float:
        """Probability of a draw at or below sigma."""

    def quantile(self, probability: float) -> float:
        """The sigma whose cdf is `probability`."""


@dataclass(frozen=True)
class Uniform:
    """Every sigma alike."""

    def cdf(self, sigma: float) -> float:
        return sigma

    def quantile(self, probability: float) -> float:
        return probability


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid(mean + scale * n), n ~ N(0, 1) (arXiv:2403.03206)."""

    mean: float
    scale: float

    def cdf(self, sigma: float) -> float:
        if sigma <= 0 or sigma >= 1:
            return float(sigma >= 1)
        return NormalDist(self.mean, self.scale).cdf(math.log(sigma / (1 - sigma)))

    def quantile(self, probability: float) -> float:
        if probability <= 0 or probability >= 1:
            return float(probability >= 1)
        return _sigmoid(NormalDist(self.mean, self.scale).inv_cdf(probability))


@dataclass(frozen=True)
class Beta:
    """Density proportional to s^(a-1) (1-s)^(b-1).

    The CDF has no closed form. In z = logit(s) the density is s^a (1-s)^b: bounded, with one peak and exponential tails even where
    it has poles in s, so a trapezoidal table over z is accurate for every a and b.
    """

    a: float
    b: float

    POINTS = 1 << 14
    NEGLIGIBLE = 36.0
    """The table ends where the density has fallen by e^-36, which is fp64's resolution."""

    def cdf(self, sigma: float) -> float:
        if sigma <= 0 or sigma >= 1:
            return float(sigma >= 1)
        grid, cumulative = self._table
        return float(numpy.interp(math.log(sigma / (1 - sigma)), grid, cumulative, left=0.0, right=1.0))

    def quantile(self, probability: float) -> float:
        grid, cumulative = self._table
        return _sigmoid(float(numpy.interp(probability, cumulative, grid)))

    def _log_density(self, z: Any) -> Any:
        return -self.a * numpy.logaddexp(0, -z) - self.b * numpy.logaddexp(0, z)

    def _edge(self, peak: float, direction: int) -> float:
        floor = self._log_density(peak) - self.NEGLIGIBLE
        distance = 1.0
        while self._log_density(peak + direction * distance) > floor:
            distance *= 2
        return peak + direction * distance

    @cached_property
    def _table(self) -> tuple[Any, Any]:
        peak = math.log(self.a / self.b)
        grid = numpy.linspace(self._edge(peak, -1), self._edge(peak, 1), self.POINTS)
        density = numpy.exp(self._log_density(grid) - self._log_density(peak))
        cumulative = numpy.concatenate([[0.0], numpy.cumsum((density[1:] + density[:-1]) / 2)])
        return grid, cumulative / cumulative[-1]


def build_density(timesteps: Timesteps) -> Density:
    """The density that `spec.objective.timesteps.sampling` names."""
    if timesteps.sampling == "uniform":
        return Uniform()
    if timesteps.sampling == "beta":
        return Beta(timesteps.beta_a, timesteps.beta_b)
    return LogitNormal(timesteps.logit_mean, timesteps.logit_scale)


@dataclass(frozen=True)
class ConstantShift:
    """The same k for every size."""

    k: float

    def factor(self, tokens: int) -> float:
        """k > 0 for a sample of `tokens` tokens."""
        return self.k


@dataclass(frozen=True)
class DynamicShift:
    """k by the number of target tokens L: mu is linear in L through the two points, k = e^mu (arXiv:2403.03206, section 5.3.2).

    The defaults are those of diffusers' `FlowMatchEulerDiscreteScheduler`. Schedulers of `time_shift_type` linear take k = mu.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    exponential: bool = True

    def factor(self, tokens: int) -> float:
        """k > 0 for a sample of `tokens` tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class EmpiricalShift:
    """k by the number of target tokens L and of sampling steps, as diffusers' `compute_empirical_mu` fits it; k = e^mu.

    mu is linear in L for 10 steps and for 200, between these linear in the steps, and above 4300 tokens that of 200 steps.
    """

    steps: int = 50
    """The pipeline's own number of steps."""

    LONG = 4300

    def factor(self, tokens: int) -> float:
        """k > 0 for a sample of `tokens` tokens."""
        of_10 = 8.73809524e-05 * tokens + 1.89833333
        of_200 = 0.00016927 * tokens + 0.45666666
        share = 1.0 if tokens > self.LONG else (self.steps - 10) / 190
        return math.exp(of_10 + (of_200 - of_10) * share)


Shift = ConstantShift | DynamicShift | EmpiricalShift


def resolve_shift(
    user: str, scheduler_config: Mapping[str, Any], family_shift: float | Literal["dynamic", "empirical", "none"]
) -> Shift:
    """The shift in force: the user's value, else the checkpoint's scheduler, else the family's.

    Raises ConfigError where a number is not a positive shift.
    """
    if user == "none":
        return ConstantShift(1.0)
    if user == "dynamic":
        return _dynamic_shift(scheduler_config)
    if user != "auto":
        return ConstantShift(_positive(float(user), "spec.objective.timesteps.shift"))
    if scheduler_config.get("use_dynamic_shifting"):
        return _dynamic_shift(scheduler_config)
    for key in ("shift", "flow_shift"):
        if scheduler_config.get(key) is not None:
            return ConstantShift(_positive(float(scheduler_config[key]), f"{key} of the checkpoint's scheduler"))
    if family_shift == "dynamic":
        return _dynamic_shift(scheduler_config)
    if family_shift == "empirical":
        return EmpiricalShift()
    return ConstantShift(1.0 if family_shift == "none" else family_shift)


def shift_sigma(sigma: float, k: float) -> float:
    """k s / (1 + (k - 1) s). S_k after S_j is S_kj, so the inverse is the shift by 1 / k."""
    return k * sigma / (1 + (k - 1) * sigma)


def range_probabilities(density: Density, k: float, stage: Stage) -> tuple[float, float]:
    """The cdf, before the shift, at the two ends of the stage's range, which is meant after the shift."""
    return density.cdf(shift_sigma(stage.low, 1 / k)), density.cdf(shift_sigma(stage.high, 1 / k))


def draw_sigma(density: Density, k: float, stage: Stage, generator: torch.Generator) -> float:
    """One shifted sigma inside the stage's range, from one uniform number of the generator.

    Raises ConfigError where the density has no mass in the range.
    """
    below, up_to = range_probabilities(density, k, stage)
    if up_to - below < SMALLEST_MASS:
        raise no_mass([stage])
    uniform = 1 - float(
        torch.rand((), generator=generator, dtype=torch.float64)
    )  # (0, 1]: sigma 0 has no noise to learn
    sigma = shift_sigma(density.quantile(below + (up_to - below) * uniform), k)
    # Only rounding of the inverse CDF can leave the range; and sigma 0 in fp32 would.
    return min(max(sigma, stage.low, torch.finfo(torch.float32).tiny), stage.high)


def no_mass(stages: Sequence[Stage]) -> ConfigError:
    """The error for a density that never draws inside the ranges that are trained."""
    ranges = ", ".join(f"{stage.denoiser} {stage.low:g} to {stage.high:g}" for stage in stages)
    return ConfigError(
        f"spec.objective.timesteps draws no sigma in the range that is trained ({ranges}); "
        "allowed is a density with mass there: change its logitMean, logitScale, betaA, betaB or shift"
    )


def _dynamic_shift(config: Mapping[str, Any]) -> DynamicShift:
    keys = {
        "base_shift": "base_shift",
        "max_shift": "max_shift",
        "base_tokens": "base_image_seq_len",
        "max_tokens": "max_image_seq_len",
    }
    given = {field: config[key] for field, key in keys.items() if config.get(key) is not None}
    shift = DynamicShift(**given, exponential=config.get("time_shift_type") != "linear")
    if shift.base_tokens >= shift.max_tokens:
        raise ConfigError(
            f"base_image_seq_len of the checkpoint's scheduler is {shift.base_tokens}; it must be below max_image_seq_len, "
            f"which is {shift.max_tokens}; set spec.objective.timesteps.shift to a number, or mend scheduler_config.json"
        )
    return shift


def _positive(value: float, where: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{where} is {value:g}; a shift must be above 0; set spec.objective.timesteps.shift")
    return value


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
