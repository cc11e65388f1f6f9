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


def as_they_are(_: Any, latents: Tensor) -> Tensor:
    return latents


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
    classifier-free guidance, `guided` are arguments that switch real guidance of 3 on where that is not `guidance_scale`.
    `combine` is the pipeline's guidance where it is another; None where the guidance is embedded only and there is no second
    prediction. `embedded` is the guidance that the denoiser is told. `clips`: the autoencoder of a family of pictures takes clips,
    here of one frame. `noise`: how its scheduler counts noise, as `flow` does times 1000, `inverted` by the share of the clean
    picture, or as `edm`, whose latents are clean + sigma * noise. `negative` is the prompt that it contrasts with. `picture_step` is
    what the pipeline rounds its pictures to, of a range from 0 to 1; 0 if it does not round.
    `references` is how many reference pictures its samples have, where the family takes some.
    `width`, `height` and `frames` are those of its samples, larger where its autoencoder would leave nothing of the usual scene.
    """

    make: Callable[[], Any]
    to_grid: Grid = as_they_are
    from_grid: Grid = as_they_are
    guidance_off: float = 1.0
    guided: Mapping[str, Any] = field(default_factory=dict)
    combine: Combine | None = from_the_negative
    embedded: float | None = None
    clips: bool = False
    noise: Literal["flow", "inverted", "edm"] = "flow"
    negative: str = ""
    picture_step: float = 0.0
    references: int = 1
    width: int = WIDTH
    height: int = HEIGHT
    frames: int = FRAMES


Config = tuple[type[nn.Module], Mapping[str, Any]]
"""A class, and the published config as far as it differs from the class's defaults."""


@dataclass(frozen=True)
class Published:
    """`denoisers` by flavour, in the order of the API's table; `encoders` and `autoencoder` build theirs.

    `features` are those of a caption of full length, where they have other names than most. `encoders_of` has the flavours whose
    encoders are others.
    """

    denoisers: Mapping[str, Config]
    encoders: Callable[[], list[nn.Module]]
    autoencoder: Callable[[], nn.Module]
    features: Callable[[], dict[str, Tensor]] | None = None
    encoders_of: Mapping[str, Callable[[], list[nn.Module]]] = field(default_factory=dict)
