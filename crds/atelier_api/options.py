"""Options that need another option, or a kind of family, to do anything. One table: the rules and the CRD are made from it.

An option at its default counts as not given, because the API server fills in every default before anyone sees the object.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atelier_api.families import FamilyFacts
from atelier_api.fields import Node, tree
from atelier_api.layouts import LAYOUTS
from atelier_api.problem import Problem, refused
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.objective import Objective


@dataclass(frozen=True)
class Only:
    """Options that may differ from their default only where `owner` is one of `values`, or where `or_with` is given.

    Options and owner are paths below `spec`. The owner `family.<fact>` is a fact of the model's family; without `values` the owner
    is a list that must hold something. `or_with` is a path below `spec` to something that is off by default.
    """

    options: tuple[str, ...]
    owner: str
    values: tuple[str, ...] = ()
    or_with: str = ""

    @property
    def reason(self) -> str:
        """`only for loss huber`, `only for flow families`."""
        if self.owner == BETAS:
            return "only for families with betas"
        if self.owner.startswith("family."):
            return f"only for {' and '.join(self.values)} families" + (
                f" or with spec.{self.or_with}" * bool(self.or_with)
            )
        if not self.values:
            return f"only with spec.{self.owner}"
        return f"only for {self.owner.rpartition('.')[2]} {' or '.join(self.values)}"


BETAS = "family.noise_schedule"
OBJECTIVE_OWNERS = ("family.objective", BETAS)

ONLY = (
    Only(
        (
            *("objective.prediction", "objective.minSnrGamma", "objective.diff2Flow"),
            *("objective.noise.offset", "objective.noise.zeroTerminalSnr"),
        ),
        "family.objective",
        ("diffusion",),
    ),
    Only(("objective.prediction", "objective.noise.zeroTerminalSnr", "objective.diff2Flow"), BETAS, ("betas",)),
    Only(
        tuple(
            f"objective.timesteps.{name}" for name in ("sampling", "logitMean", "logitScale", "betaA", "betaB", "shift")
        ),
        "family.objective",
        ("flow",),
        or_with="objective.diff2Flow",
    ),
    Only(("objective.twinFlow",), "family.objective", ("flow",)),
    Only(
        # A control network and new words leave the denoiser as it is, in steps and all.
        ("objective.twinFlow",),
        "adapter.type",
        tuple(kind for kind in LAYOUTS if kind not in ("controlnet", "textual-inversion")),
    ),
    Only(("data.clip.frames", "data.clip.fps", "validation.frames"), "family.modality", ("video",)),
    Only(
        ("data.audio.maxSeconds", "data.audio.minSeconds", "data.audio.bucketSeconds", "validation.seconds"),
        "family.modality",
        ("audio",),
    ),
    Only(
        (
            *("data.resolution", "data.bucketAlign", "data.crop", "data.maxUpscale"),
            *("validation.width", "validation.height"),
        ),
        "family.modality",
        ("image", "video"),
    ),
    Only(
        # No caption is dropped in textual inversion: what is learnt is in the captions alone.
        ("data.captions.dropout",),
        "adapter.type",
        tuple(kind for kind in LAYOUTS if kind != "textual-inversion"),
    ),
    Only(
        # A control network and new words leave the denoiser's blocks as they are: none could learn from another.
        ("techniques.layerSync",),
        "adapter.type",
        tuple(kind for kind in LAYOUTS if kind not in ("controlnet", "textual-inversion")),
    ),
    Only(("objective.huberC",), "objective.loss", ("huber",)),
    Only(
        ("objective.timesteps.logitMean", "objective.timesteps.logitScale"),
        "objective.timesteps.sampling",
        ("logit-normal",),
    ),
    Only(("objective.timesteps.betaA", "objective.timesteps.betaB"), "objective.timesteps.sampling", ("beta",)),
    Only(("objective.noise.zeroTerminalSnr",), "objective.prediction", ("v",)),
    Only(("hyperparameters.schedule.end",), "hyperparameters.schedule.type", ("linear", "cosine", "polynomial")),
    Only(("hyperparameters.schedule.power",), "hyperparameters.schedule.type", ("polynomial",)),
    Only(
        tuple(
            f"validation.{name}" for name in ("everySteps", "steps", "guidance", "width", "height", "frames", "seconds")
        ),
        "validation.prompts",
    ),
)


def unused(spec: TrainingRunSpec, facts: FamilyFacts | None) -> Iterator[Problem]:
    """A problem for each option that would do nothing. Each option is named once, by its first reason."""
    return _unused(spec.model_dump(mode="json", by_alias=True), facts, ONLY)


def unused_objective(objective: Objective, facts: FamilyFacts) -> Iterator[Problem]:
    """The same for `spec.objective` alone: options of the other kind of family."""
    document = {"objective": objective.model_dump(mode="json", by_alias=True)}
    return _unused(document, facts, [only for only in ONLY if only.owner in OBJECTIVE_OWNERS])


def _unused(document: Mapping[str, Any], facts: FamilyFacts | None, table: Sequence[Only]) -> Iterator[Problem]:
    told: set[str] = set()
    for only in table:
        if only.owner.startswith("family.") and facts is None:
            continue
        owner = _owner(only, document, facts)
        if owner in only.values or (not only.values and owner):
            continue
        if only.or_with and look_up(document, only.or_with) is not None:
            continue
        for option in only.options:
            value = look_up(document, option)
            if option not in told and value != node_at(option).default:
                told.add(option)
                is_what = f", and {facts.name} is of {owner}" if facts and only.owner.startswith("family.") else ""
                yield refused(f"spec.{option}", value, only.reason + is_what)


def look_up(document: Mapping[str, Any], path: str) -> Any:
    """The value at a path below `spec`, in wire form."""
    value: Any = document
    for name in path.split("."):
        value = value[name]
    return value


def node_at(path: str) -> Node:
    """The node at a path below `spec`."""
    node = tree().fields["spec"]
    for name in path.split("."):
        node = node.fields[name]
    return node


def _owner(only: Only, document: Mapping[str, Any], facts: FamilyFacts | None) -> Any:
    if only.owner.startswith("family."):
        return getattr(facts, only.owner.removeprefix("family."))
    return look_up(document, only.owner)
