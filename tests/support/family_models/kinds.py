"""What the tests know of each family: a tiny pipeline, and its published sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from family_models.scene import FRAMES, HEIGHT, WIDTH

Grid = Callable[[Any, Tensor], Tensor]
"""(pipeline, latents) to latents."""
Combine = Callable[[Tensor, Tensor, float], Tensor]
"""(positive prediction, negative, guidance) to the guided one."""
Finish = Callable[[Tensor], Tensor]
"""What the autoencoder decodes to what the pipeline gives."""


def as_they_are(_: Any, latents: Tensor) -> Tensor:
    return latents


def to_unit_range(decoded: Tensor) -> Tensor:
    """Pixels in [-1, 1] to those in [0, 1]."""
    return (decoded / 2 + 0.5).clamp(0, 1)


def from_the_negative(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance as most pipelines have it."""
    return negative + guidance * (positive - negative)


def from_the_positive(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Guidance whose 0 is the positive prediction alone."""
    return positive + guidance * (positive - negative)


@dataclass(frozen=True)
class Tiny:
    """A stock pipeline of real classes with random weights: no download, under a second, and what is particular of it.

    `to_grid` and `from_grid` lead from its own layout of latents to ours and back. `guidance_off` is the `guidance_scale` without
    classifier-free guidance, `guided` are arguments that switch real guidance of 3 on where that is not `guidance_scale`. `combine`
    is the pipeline's guidance where it is another; None where the guidance is embedded only and there is no second prediction.
    `combine_of_run` makes one for a run, where guidance remembers earlier steps. `embedded` is the guidance that the denoiser is
    told. `clips`: the autoencoder of a family of pictures takes clips, here of one frame. `noise`: how its scheduler counts noise,
    as `flow` does times 1000, `inverted` by the share of the clean picture, as `edm`, whose latents are clean + sigma * noise, or
    as `unit`, from 0 to 1. `negative` is the prompt that it contrasts with; None for what sounds are contrasted with, which is no
    prompt. `picture_step` is what the pipeline rounds its pictures to, of a range from 0 to 1; 0 if it does not round. `finish` is
    what it does to what the autoencoder decodes. `channels` are those of its latents, where a tiny autoencoder with as many as
    published would be slow. `width`, `height` and `frames` are those of its samples, larger where its autoencoder would leave
    nothing of the usual scene; `seconds` that of sounds. `shown` is how many first frames it is shown, of a family that continues
    clips. `steps` is what its pipeline makes of 4 steps. `references` is how many reference pictures its samples have, where the
    family takes some.
    """

    make: Callable[[], Any]
    to_grid: Grid = as_they_are
    from_grid: Grid = as_they_are
    guidance_off: float = 1.0
    guided: Mapping[str, Any] = field(default_factory=dict)
    combine: Combine | None = from_the_negative
    combine_of_run: Callable[[], Combine] | None = None
    embedded: float | None = None
    clips: bool = False
    noise: Literal["flow", "inverted", "edm", "unit"] = "flow"
    negative: str | None = ""
    picture_step: float = 0.0
    finish: Finish = to_unit_range
    channels: int | None = None
    references: int = 1
    width: int = WIDTH
    height: int = HEIGHT
    frames: int = FRAMES
    shown: int = 1
    steps: int = 4
    seconds: float = 1.0


Config = tuple[type[nn.Module], Mapping[str, Any]]
"""A class, and the published config as far as it differs from the class's defaults."""


@dataclass(frozen=True)
class Published:
    """`denoisers` by flavour, in the order of the API's table; `encoders` and `autoencoder` build theirs.

    `features` are those of a caption of full length, where they have other names than most; `shared` what all samples are told.
    `encoders_of` has the flavours whose encoders are others.
    """

    denoisers: Mapping[str, Config]
    encoders: Callable[[], list[nn.Module]]
    autoencoder: Callable[[], nn.Module]
    features: Callable[[], dict[str, Tensor]] | None = None
    shared: Callable[[], dict[str, Tensor]] = dict
    encoders_of: Mapping[str, Callable[[], list[nn.Module]]] = field(default_factory=dict)
