"""Cases that share all but their denoisers: most tests change nothing else, and encoders take longer than what is tested."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from atelier_runtime.family import Conditions
from family_cases import Case, make_case


@dataclass(frozen=True)
class SharedCase(Case):
    """Its conditions and latents are those of all cases of its name, made once: no test may write into them."""

    def conditions(
        self, prompts: Sequence[str | None], guidance: float | None = None, samples: Sequence[int] | None = None
    ) -> Conditions:
        return _conditions(self.name, tuple(prompts), guidance, None if samples is None else tuple(samples))

    def latents(self, count: int) -> Tensor:
        return _latents(self.name, count)


def shared_case(name: str) -> SharedCase:
    """A case with denoisers and a sampler of its own; the other parts of its pipeline are those of all shared cases of this name."""
    case = _case(name)
    pipe = copy.copy(case.pipe)
    for component in (*case.denoisers, "scheduler"):
        setattr(pipe, component, copy.deepcopy(getattr(pipe, component)))
    return SharedCase(name, pipe, case.family)


@cache
def _case(name: str) -> Case:
    """Never handed out: its denoisers are as they were made."""
    with torch.random.fork_rng(devices=[]):  # whoever comes first draws what the others draw
        return make_case(name)


@cache
def _conditions(
    name: str, prompts: tuple[str | None, ...], guidance: float | None, samples: tuple[int, ...] | None
) -> Conditions:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return _case(name).conditions(prompts, guidance, samples)


@cache
def _latents(name: str, count: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return _case(name).latents(count)
