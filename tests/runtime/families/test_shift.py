"""The shift of a run on every family: it moves the levels that are trained, of every denoiser, and the denoiser is told of those.

Diffusion families have a shift with Diff2Flow alone.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from atelier_api.v1alpha1.objective import Diff2Flow, Objective, Timesteps
from atelier_runtime.family import Stage
from atelier_runtime.objectives import Prepared, build_objective
from atelier_runtime.objectives.bridge import flow_sigma
from family_cases import CASES, PROMPTS, Case
from shared_cases import shared_case

pytestmark = pytest.mark.cell("shift")

SHIFT = 2.0
"""Of no tiny checkpoint and of no family."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    case = shared_case(request.param)
    if case.family.facts.noise_schedule == "cosine":
        pytest.skip("its time is drawn uniformly from a cosine, which no shift moves")
    return case


def stages(case: Case) -> tuple[Stage, ...]:
    return case.family.stages(case.pipeline_config, tuple(case.denoisers))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def prepared(case: Case, clean: Tensor, stage: Stage, shift: str) -> Prepared:
    """Samples of a run with that shift on the tiny checkpoint."""
    diff2_flow = Diff2Flow() if case.family.facts.objective == "diffusion" else None
    spec = Objective(timesteps=Timesteps(shift=shift), diff2_flow=diff2_flow)
    objective = build_objective(spec, case.family.facts, case.pipe.scheduler.config)
    return objective.prepare(clean, generators(len(clean)), stage=stage, tokens=16)


def shifted(sigma: Tensor, k: float) -> Tensor:
    return k * sigma / (1 + (k - 1) * sigma)


def by_hand(stage: Stage, drawn: Sequence[torch.Generator]) -> Tensor:
    """Sigma [B]: of the logit-normal density that part which lies in the stage's range once it is shifted."""
    uniform = 1 - torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in drawn])
    ends = shifted(torch.tensor([stage.low, stage.high], dtype=torch.float64), 1 / SHIFT)
    below, up_to = torch.special.ndtr(torch.logit(ends))
    return shifted(torch.sigmoid(torch.special.ndtri(below + (up_to - below) * uniform)), SHIFT)


def test_the_levels_of_every_denoiser_are_drawn_from_the_density_that_the_run_shifts(case: Case) -> None:
    for stage in stages(case):
        made = prepared(case, torch.zeros(40, 1, 1, 1), stage, str(SHIFT))
        expected = by_hand(stage, generators(40))
        if case.family.facts.objective == "flow":
            torch.testing.assert_close(made.time, expected.float(), atol=1e-6, rtol=1e-5)
        else:
            levels = flow_sigma(case.pipe.scheduler.alphas_cumprod.double())
            nearest = (levels - expected.unsqueeze(1)).abs().amin(dim=1)
            torch.testing.assert_close((levels[made.time] - expected).abs(), nearest, atol=1e-6, rtol=0)


@torch.no_grad()
def test_every_denoiser_is_told_of_the_shifted_level(case: Case) -> None:
    """With the noisy latents of the shifted levels and the times of the others, it predicts something else."""
    clean, conditions = case.latents(2), case.conditions(PROMPTS)
    for stage in stages(case):
        made = prepared(case, clean, stage, str(SHIFT))
        unshifted = prepared(case, clean, stage, "none")
        assert (made.noisy - unshifted.noisy).abs().flatten(1).amax(dim=1).min() > 1e-3
        denoiser = case.denoisers[stage.denoiser]
        found, other = (case.family.predict(denoiser, made.noisy, each.time, conditions) for each in (made, unshifted))
        assert (found - other).abs().flatten(1).amax(dim=1).min() > 1e-5
