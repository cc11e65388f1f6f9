"""TwinFlow on a network small enough to be trained to the end: two clusters of points, which one step of the base misses by far."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from atelier_api.families import FamilyFacts
from atelier_api.v1alpha1.objective import Objective
from atelier_runtime.family import Conditions, Stage, TimeEmbedder
from atelier_runtime.few_steps import FewSteps, Times
from atelier_runtime.objectives import build_objective
from atelier_runtime.optimizers import Ema
from atelier_runtime.run_network import RunNetwork

FLOW = FamilyFacts(
    name="tiny_flow", title="", modality="image", objective="flow", pixel_multiple=16, latent_channels=2,
    latent_factor=8, patch=2, shift="none", licence="", flavours=(),
)  # fmt: skip
CENTRES = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])
NOTHING = Conditions(text={}, sizes=torch.zeros(1, 6))


class Waves(nn.Module):
    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * 2 ** torch.arange(5) * math.pi / 2
        return torch.cat([time[:, None], angles.sin(), angles.cos()], dim=1)


class Network(nn.Module):
    """A velocity of points [B, 2, 1, 1]."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.waves = Waves()
        self.embedder = nn.Sequential(nn.Linear(11, width), nn.SiLU(), nn.Linear(width, width))
        self.entry, self.exit = nn.Linear(2, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, points: Tensor, time: Tensor) -> Tensor:
        told = self.embedder(self.waves(time))
        hidden = nn.functional.silu(self.entry(points.flatten(1)) + told)
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden) + told)
        velocity: Tensor = self.exit(hidden).view(points.shape)
        return velocity


class Family:
    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, _: Conditions) -> Tensor:
        velocity: Tensor = denoiser(noisy, time)
        return velocity


def points(count: int, generator: torch.Generator) -> Tensor:
    centres = CENTRES[torch.randint(0, 2, (count,), generator=generator)]
    return (centres + 0.1 * torch.randn(count, 2, generator=generator)).view(count, 2, 1, 1)


def pretrained(generator: torch.Generator) -> Network:
    """By plain flow matching."""
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(600):
        clean = points(256, generator)
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.rand(len(clean), generator=generator)
        level = time.view(-1, 1, 1, 1)
        loss = (network((1 - level) * clean + level * noise, time) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def drawn(network: Network, steps: FewSteps, count: int) -> Tensor:
    """[1000, 2] drawn in `count` even steps."""
    x = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    levels = torch.linspace(1, 0, count + 1)
    for start, end in pairwise(levels):
        time = start.expand(len(x))
        with steps.telling(Times(time, end.expand(len(x)), time < 0)):
            x = x - (start - end) * network(x, time)
    return x.flatten(1)


def miss(found: Tensor) -> float:
    """Mean distance to the nearest centre; 0.125 of the points themselves."""
    return float((found[:, None] - CENTRES).norm(dim=2).amin(1).mean())


def test_one_step_comes_to_draw_what_many_steps_of_the_base_draw() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = pretrained(generator)
    steps = FewSteps(network, TimeEmbedder("embedder", "waves"))
    steps.put_on(network, torch.float32)
    noise = torch.randn(1000, 2, 1, 1, generator=generator)
    with torch.no_grad():
        base = noise - network(noise, torch.ones(1000))
    assert miss(base.flatten(1)) > 1.3  # one step of the base draws the mean of both
    spec = {"twinFlow": {"enhancedRatio": "0"}, "timesteps": {"sampling": "uniform", "shift": "none"}}
    objective = build_objective(Objective.model_validate(spec), FLOW, {})
    average = Ema(dict(network.named_parameters()), 0.98)
    asked = RunNetwork(Family(), (), bf16=False, device=torch.device("cpu"), averaged=average.swapped)  # type: ignore[arg-type]
    asked.denoiser, asked.conditions = network, NOTHING
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(120):
        own = [torch.Generator().manual_seed(10_007 * step + slot) for slot in range(64)]
        prepared = objective.prepare(points(64, generator), own, stage=Stage("network"), tokens=1)
        optimizer.zero_grad()
        objective.losses(asked, prepared, None).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update()
    with average.swapped():
        one, two = drawn(network, steps, 1), drawn(network, steps, 2)
    assert miss(one) < 0.4
    assert miss(two) < miss(one)
    assert 0.3 < float((one[:, 0] > 0).float().mean()) < 0.7
