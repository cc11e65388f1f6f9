"""TwinFlow (arXiv:2512.05150): a flow model learns to draw in few steps, its moving average its teacher and itself its critic.

F(x, s, r) is the average velocity on the way from noise level s down to r <= s; at r = s it is the velocity of flow matching. At
negative times (-s, -s) the same network learns the velocities of what it draws itself in one step: the twin.

Each sample has one of four roles: `whole` (from 1 to 0), `near` (r just below s), `any` (any s and r), and with `adversarial` `fake`.
With u = noise - clean, T the teacher, d = delta and c the caption:

* u' = u + ratio (T(x_s, s, s | c) - T(x_s, s, s | no caption)): what guidance would do, learnt.
* From x_s - (s - m) u' at m = max(s - d, r) the teacher goes on to r in `order` steps t_0 = m > ... > t_N = r, of velocities f_i; each
  step is x + (t_{i+1} - t_i) f_i, the same as noising its own clean picture anew. A = sum f_i (t_i - t_{i+1}).
* The residual is E = ((s - r) F - A) / d - u' where s >= r + d, else F - u': 0 where F is the average velocity. The target is
  F - clamp(E), without gradient.
* A sample's loss is h(F, target) w with w = tan(0.4 pi (1 - (s - r))) + 1, and h = m / sqrt(m + 1e-6) of the mean squared error m,
  whose gradient is that of m over its size (the root has none).
* `fake`: x = z - F(z, 1, 0) is drawn without gradient and noised to a level t; at times (-t, -t) the target is the velocity to it.
* Rectification, of `whole` samples: x = z - F(z, 1, 0) is noised to t, and F(z, 1, 0) moves by the difference D = F(x_t, -t, -t) -
  F(x_t, t, t), clamped: the loss is h(F, F - D), D without gradient.

A micro-batch asks for the same passes whatever its roles, masked where a role needs none: under sharding each pass is a collective.
The teacher's come first, as weights that a gradient waits for must not change. All passes of a micro-batch drop out alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atelier_api.v1alpha1.objective import Objective as ObjectiveSpec
from atelier_api.v1alpha1.objective import TwinFlow as TwinFlowSpec
from atelier_runtime.family import Stage
from atelier_runtime.few_steps import Times, few_steps_of
from atelier_runtime.objectives.flow import FlowObjective
from atelier_runtime.objectives.objective import Prepared, check_generators, draw_noise, per_sample, to_device
from atelier_runtime.objectives.timesteps import Shift, draw_sigma
from atelier_runtime.run_network import RunNetwork

WHOLE, NEAR, ANY, FAKE = range(4)
NEAREST = 0.95
"""A near step ends at this part of its start or above."""
SMOOTH = 1e-3
"""Below this root of the mean squared error the loss is one of squares."""


@dataclass(frozen=True)
class PreparedSteps(Prepared):
    """Of each sample, [B]: `time` is s, `end` r, `level` t, and the `role`. As `noisy` are `noise`, z, and `fresh`, that of what is
    drawn.

    Of a fake, s and r are t, and `noisy` and `target` are unknown until it is drawn.
    """

    end: Tensor
    role: Tensor
    noise: Tensor
    fresh: Tensor
    level: Tensor


class TwinFlowObjective(FlowObjective):
    """Average velocities, by passes of the network and its moving average."""

    def __init__(self, spec: ObjectiveSpec, shift: Shift) -> None:
        super().__init__(spec, shift)
        assert spec.twin_flow is not None
        self.twin: TwinFlowSpec = spec.twin_flow

    def prepare(
        self, clean: Tensor, generators: Sequence[torch.Generator], *, stage: Stage, tokens: int
    ) -> PreparedSteps:
        """A sample draws, whatever its role: the role, s, the place of r below s, its noise, t, and the other noise."""
        check_generators(clean, generators)
        k, roles = self.shift.factor(tokens), 4 if self.twin.adversarial else 3
        rows, noises, others = [], [], []
        for generator in generators:
            kind = int(_uniform(generator) * roles)
            s, part = draw_sigma(self.density, k, stage, generator), _uniform(generator)
            noises.append(draw_noise(clean.shape[1:], generator))
            height = 1 - _uniform(generator)  # (0, 1]
            others.append(draw_noise(clean.shape[1:], generator))
            rows.append((kind, *_step(kind, s, part, height), height))
        drawn = to_device(torch.tensor(rows, dtype=torch.float32), clean.device)
        role, start, end, level = drawn.unbind(1)
        noise, fresh = (to_device(torch.stack(each), clean.device) for each in (noises, others))
        clean, at = clean.float(), per_sample(start, clean)
        weight = torch.tan(0.4 * math.pi * (1 - (start - end))) + 1
        return PreparedSteps(
            noisy=(1 - at) * clean + at * noise,
            time=start,
            target=noise - clean,
            weight=torch.where(role == FAKE, torch.ones_like(weight), weight),
            end=end,
            role=role,
            noise=noise,
            fresh=fresh,
            level=level,
        )

    def losses(self, network: RunNetwork, prepared: Prepared, mask: Tensor | None) -> Tensor:
        assert isinstance(prepared, PreparedSteps)
        passes = Passes(network)
        with network.averaged():
            target = self._enhanced(passes, prepared)
            travelled = self._travelled(passes, prepared, target)
        steps = replace(prepared, target=target)
        if self.twin.adversarial:
            steps = self._with_fakes(passes, steps)
        prediction = passes.trained(steps).float()
        error = self.residual(prediction.detach(), travelled, steps).clamp(
            -self.twin.target_clamp, self.twin.target_clamp
        )
        losses = robust(prediction - (prediction.detach() - error), mask) * steps.weight
        if self.twin.rectify_weight:
            difference = self._difference(passes, steps, prediction.detach())
            rectified = self.twin.rectify_weight * robust(prediction - (prediction.detach() - difference), mask)
            losses = losses + torch.where(steps.role == WHOLE, rectified, torch.zeros_like(rectified))
        return losses

    def residual(self, prediction: Tensor, travelled: Tensor, steps: PreparedSteps) -> Tensor:
        """E of a prediction without gradient; `travelled` is A."""
        span = per_sample(steps.time - steps.end, prediction)
        far = (span * prediction - travelled) / self.twin.delta - steps.target
        return torch.where(span >= self.twin.delta, far, prediction - steps.target)

    def _enhanced(self, passes: "Passes", prepared: PreparedSteps) -> Tensor:
        if not self.twin.enhanced_ratio:
            return prepared.target
        contrast = passes.network.contrast
        assert contrast is not None
        at, s = prepared.noisy, prepared.time
        guided = passes.looked(at, s, s) - passes.looked(at, s, s, empty=True)
        return prepared.target + self.twin.enhanced_ratio * guided

    def _travelled(self, passes: "Passes", prepared: PreparedSteps, target: Tensor) -> Tensor:
        """A: what the teacher covers from just below s down to r, of the shape of the latents."""
        s, r = prepared.time, prepared.end
        start = torch.maximum(s - self.twin.delta, r)
        x = prepared.noisy - per_sample(s - start, target) * target
        way = torch.zeros_like(x)
        here = start
        for leg in range(self.twin.order):
            there = start + (r - start) * ((leg + 1) / self.twin.order)
            covered = passes.looked(x, here, there) * per_sample(here - there, x)
            way, x, here = way + covered, x - covered, there
        return way

    def _with_fakes(self, passes: "Passes", steps: PreparedSteps) -> PreparedSteps:
        """The samples with the fakes among them drawn: what the network makes of their noise in one step."""
        fake = per_sample(steps.role == FAKE, steps.noisy)
        whole = torch.ones_like(steps.time)
        drawn = steps.noise - passes.looked(steps.noise, whole, torch.zeros_like(whole))
        noisy, target = _noised(drawn, steps)
        return replace(
            steps, noisy=torch.where(fake, noisy, steps.noisy), target=torch.where(fake, target, steps.target)
        )

    def _difference(self, passes: "Passes", steps: PreparedSteps, prediction: Tensor) -> Tensor:
        """How the twin's velocity differs from the network's own at what one step draws, clamped; of use for whole steps alone."""
        noisy, _ = _noised(steps.noise - prediction, steps)
        t = steps.level
        difference = passes.looked(noisy, t, t, negative=True) - passes.looked(noisy, t, t)
        return difference.clamp(-self.twin.target_clamp, self.twin.target_clamp)


class Passes:
    """The passes of one micro-batch, all of which draw alike."""

    def __init__(self, network: RunNetwork) -> None:
        self.network = network
        self._few_steps = few_steps_of(network.denoiser)
        self._draws = network.draws()

    def trained(self, steps: PreparedSteps) -> Tensor:
        """The prediction that gradients go through."""
        self.network.draw_again(self._draws)
        with self._few_steps.telling(Times(steps.time, steps.end, steps.role == FAKE)):
            return self.network.predict(steps.noisy, steps.time)

    def looked(
        self, noisy: Tensor, start: Tensor, end: Tensor, *, negative: bool = False, empty: bool = False
    ) -> Tensor:
        """A prediction without gradient, at negative times where told, and without the captions."""
        self.network.draw_again(self._draws)
        sign = torch.full_like(start, negative, dtype=torch.bool)
        with self._few_steps.telling(Times(start, end, sign)):
            return self.network.look(noisy, start, self.network.contrast if empty else None)


def robust(difference: Tensor, mask: Tensor | None) -> Tensor:
    """[B]: m / sqrt(m + c^2) of the mean square m over what the mask leaves; the root passes no gradient."""
    square = difference.square()
    if mask is None:
        mean = square.flatten(1).mean(1)
    else:
        mask = mask.expand_as(square)
        mean = (square * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return mean / (mean.detach() + SMOOTH * SMOOTH).sqrt()


def _noised(drawn: Tensor, steps: PreparedSteps) -> tuple[Tensor, Tensor]:
    """What was drawn, noised to the levels t, and the velocity there."""
    level = per_sample(steps.level, drawn)
    return (1 - level) * drawn + level * steps.fresh, steps.fresh - drawn


def _step(role: int, s: float, part: float, level: float) -> tuple[float, float]:
    """(s, r) of a role, of a noise level s in (0, 1] and a `part` in [0, 1)."""
    if role == WHOLE:
        return 1.0, 0.0
    if role == FAKE:
        return level, level
    return s, s * (NEAREST + (1 - NEAREST) * part if role == NEAR else part)


def _uniform(generator: torch.Generator) -> float:
    """In [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))
