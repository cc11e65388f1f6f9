"""How a denoiser of one time is told the end of a step as well, and on which side of time it is, so that it can draw in few steps.

Beside its own embedder E of the time it gets E', which starts as a copy, and a vector n, which starts at zero. For a step from noise
level s down to r, both in [0, 1], it is then told

    E(s) + (s - r) E'(r) + n where the time is negative

in place of E(s) (arXiv:2512.05150 trains with such a pair of times and a sign). At r = s and a positive time that is what the base is
told, whatever E' and n have learnt. Nothing is told where nobody asks for a step: the denoiser is then called as the base is. Nor is
it of what the denoiser is shown beside the noise, at a time of its own that is always 0.

Families know nothing of it but where E is (`Family.time_embedder`): E is hooked, and told around a pass.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import Parameter

from atelier_runtime.family import TimeEmbedder

CHILD = "few_steps"
"""Name of the module on its denoiser, and so what the names of its parameters begin with."""

HEADER = "atelier.twin_flow."
"""Begins the names of what a file's header says of the embedder."""


Told = Tensor | tuple[Tensor, ...]
"""What an embedder makes of times: [n, ...] of each, or several such."""


@dataclass(frozen=True)
class Times:
    """Steps of a pass: from `start` down to `end`, both fp32 in [0, 1], and whether the time is `negative`.

    Each is [B] for the samples of the pass, in their order; or [1], for all that the denoiser is called with.
    """

    start: Tensor
    end: Tensor
    negative: Tensor


class FewSteps(nn.Module):
    """E' and n of one denoiser."""

    def __init__(self, denoiser: nn.Module, where: TimeEmbedder) -> None:
        """Copies the embedder as it is: to be called before an adapter is put on it. `put_on` does the rest."""
        super().__init__()
        self.embedder = copy.deepcopy(denoiser.get_submodule(where.module))
        self.waves = copy.deepcopy(denoiser.get_submodule(where.waves)) if where.waves else nn.Identity()
        config: Any = denoiser.config
        self._where = where
        self._scale = scale_of(where, config)
        device = next(self.embedder.parameters()).device
        with torch.no_grad():
            once = copy.deepcopy(self.embedder).float()(self._entering(torch.ones(1, device=device)))
        self.negative = Parameter(torch.zeros(self._flat(once).shape[-1], device=device))
        self._times: Times | None = None
        self._seen = 0

    def put_on(self, denoiser: nn.Module, dtype: torch.dtype) -> None:
        """Make it a part of the denoiser that trains in `dtype`. To be called behind the adapter and before sharding."""
        self.to(dtype).requires_grad_(True)
        denoiser.add_module(CHILD, self)
        denoiser.get_submodule(self._where.module).register_forward_hook(self._told)

    @contextmanager
    def telling(self, times: Times) -> Iterator[None]:
        """Passes inside are steps of these times. Raises RuntimeError where an embedder is not asked once for each sample."""
        self._times, self._seen = times, 0
        try:
            yield
        finally:
            self._times = None
        if len(times.start) > 1 and self._seen != len(times.start):
            raise RuntimeError(
                f"{self._where.module} was asked for {self._seen} times in a pass of {len(times.start)} samples"
            )

    def _told(self, _module: nn.Module, given: tuple[Tensor, ...], output: Told) -> Told | None:
        times = self._times
        if times is None:
            return None
        base, whole, alone = self._flat(output), len(times.start), self._where.rows == "sample"
        # Families call some networks for one sample at a time.
        asked = len(base) if alone else whole
        rows = slice(self._seen, self._seen + asked) if whole > 1 else slice(None)
        self._seen += asked
        start, end, negative = times.start[rows], times.end[rows], times.negative[rows]
        dtype = self.negative.dtype
        # Where it alone trains in bf16, what goes into its layers is not cast by anyone else.
        casting = torch.autocast(base.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
        with casting:
            second = self._flat(
                self.embedder(self._entering(end).to(dtype) if self._where.waves else self._entering(end))
            )
        added = (start - end).unsqueeze(1) * second + negative.float().unsqueeze(1) * self.negative
        if not alone:
            added = self._spread(added, given[0], len(base))
        return _like(output, base + added.to(base.dtype))

    def _spread(self, added: Tensor, given: Tensor, rows: int) -> Tensor:
        """What is `added` for each sample, of its rows: nothing where what is `given` to the embedder is that of sigma 0."""
        each = rows // len(added)
        spread = added.repeat_interleave(each, 0) if self._where.rows == "parts" else added.repeat(each, 1)
        clean = self._entering(torch.zeros(1, device=given.device)).to(given.dtype)
        shown = (given.reshape(rows, -1) == clean.reshape(1, -1)).all(1)
        return spread.masked_fill(shown.unsqueeze(1), 0)

    def _flat(self, output: Told) -> Tensor:
        """All that an embedder makes of a time, side by side, in a row for each: [n, W]."""
        parts = output if isinstance(output, tuple) else (output,)
        if self._where.rows == "parts":
            return torch.cat([part.flatten(0, -2) for part in parts], dim=1)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _entering(self, sigma: Tensor) -> Tensor:
        """What the denoiser's own embedder is given at these noise levels [n]."""
        waves: Tensor = self.waves(self._scale * (1 - sigma if self._where.reversed else sigma))
        return waves


def _like(output: Told, flat: Tensor) -> Told:
    """`flat` [n, W] as such an output is."""
    if not isinstance(output, tuple):
        return flat.view_as(output)
    parts = torch.split(flat, [part[0].numel() for part in output], dim=1)
    return tuple(part.view_as(like) for part, like in zip(parts, output, strict=True))


def few_steps_of(denoiser: nn.Module) -> FewSteps:
    """The module on a denoiser, also on one inside DistributedDataParallel."""
    found = getattr(denoiser, "module", denoiser).get_submodule(CHILD)
    assert isinstance(found, FewSteps)
    return found


class EvenSteps(FlowMatchEulerDiscreteScheduler):
    """Steps of even size from noise to picture, of a network that knows the average velocity on each: x - (s - r) F(x, s, r).

    Whatever noise levels a pipeline wishes for, and whatever shift the checkpoint has: a shift spends steps where the velocity turns,
    and the average velocity has no turns.

    Where the config has a `sigma_max`, the pipeline counts noise as a multiple k of the picture, s / (1 - s) up to there, and its
    latents are x / (1 - s). A step of Euler in k is then the same step of x: with x = c + s F it goes to c + k' (c + F), which is
    (c + r F) / (1 - r).
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        if num_inference_steps is None:
            wished = timesteps if sigmas is None else sigmas
            assert wished is not None
            num_inference_steps = len(wished)
        self.num_inference_steps = num_inference_steps
        most = self.config.get("sigma_max")
        first = most / (1 + most) if most else 1.0
        self._levels = torch.linspace(first, 0, num_inference_steps + 1, dtype=torch.float32)
        # Some pipelines count from noise at 0 to the picture at 1.
        counted = 1 - self._levels if self.config.invert_sigmas else self._levels
        self.sigmas = counted / (1 - counted) if most else counted  # on the CPU, as diffusers has them
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = self._begin_index = None

    @property
    def step_times(self) -> Times:
        """Of the step that comes next."""
        at = self.step_index or 0
        return Times(self._levels[at : at + 1], self._levels[at + 1 : at + 2], torch.zeros(1, dtype=torch.bool))


@contextmanager
def few_step_sampling(pipe: Any, denoiser: nn.Module) -> Iterator[None]:
    """Inside, the stock pipeline draws in as many steps as it is asked for, each told its end. Guidance has to be off."""
    steps, given = few_steps_of(denoiser), pipe.scheduler
    pipe.scheduler = even_steps_for(given)

    handle = denoiser.register_forward_pre_hook(partial(_tell_next, steps, pipe))
    try:
        yield
    finally:
        handle.remove()
        steps._times, pipe.scheduler = None, given


def few_step_pipeline(pipe: Any, path: str | Path) -> Any:
    """The stock pipeline, made to draw in few even steps by the file that a run has exported beside its adapter.

    To be called before the adapter is loaded, as that may change the embedder which is copied. Guidance has to be off. Gives `pipe`
    back.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    denoiser = getattr(pipe, header["atelier.component"])
    where = TimeEmbedder(
        header[f"{HEADER}module"],
        header[f"{HEADER}waves"],
        scale=float(header[f"{HEADER}scale"]),
        reversed=header[f"{HEADER}reversed"] == "true",
        rows=header[f"{HEADER}rows"],
    )
    steps = FewSteps(denoiser, where)
    steps.load_state_dict(load_file(path))
    steps.put_on(denoiser, next(steps.embedder.parameters()).dtype)
    steps.requires_grad_(False)
    pipe.scheduler = even_steps_for(pipe.scheduler)
    denoiser.register_forward_pre_hook(partial(_tell_next, steps, pipe))
    return pipe


def header_of(where: TimeEmbedder, config: Mapping[str, Any]) -> dict[str, str]:
    """What a file says of the embedder of a denoiser with this config."""
    return {
        f"{HEADER}module": where.module,
        f"{HEADER}waves": where.waves,
        f"{HEADER}scale": repr(float(scale_of(where, config))),
        f"{HEADER}reversed": "true" if where.reversed else "false",
        f"{HEADER}rows": where.rows,
    }


def scale_of(where: TimeEmbedder, config: Mapping[str, Any]) -> float:
    """What sigma is multiplied by on its way into the embedder of a denoiser with this config."""
    return where.scale * (float(config[where.scale_field]) if where.scale_field else 1.0)


def even_steps_for(scheduler: Any) -> EvenSteps:
    """In place of a scheduler; a pipeline that would end above 0 is to go all the way."""
    even = EvenSteps.from_config(scheduler.config)
    if "final_sigmas_type" in even.config:
        even.register_to_config(final_sigmas_type="zero")
    return even


def _tell_next(steps: FewSteps, pipe: Any, *_: Any) -> None:
    """Leave the step that the pipeline's scheduler comes to next."""
    times, device = pipe.scheduler.step_times, steps.negative.device
    steps._times = Times(times.start.to(device), times.end.to(device), times.negative.to(device))
