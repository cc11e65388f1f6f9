"""What the fields of a run must be to its model family: `rules` applies them. Pure."""

import math
from collections.abc import Callable, Iterator

from atelier_api.families import FAMILIES, FamilyFacts
from atelier_api.layouts import written
from atelier_api.problem import Problem, choice, refused
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.adapter import ControlNetAdapter, LoraAdapter, TextualInversionAdapter
from atelier_api.v1alpha1.data import Data
from atelier_api.v1alpha1.validation import PICTURE_FIELDS

FINE_BELOW = 512
COARSE_ALIGNMENT = 64


def bucket_alignment(spec: TrainingRunSpec, facts: FamilyFacts) -> int:
    """The multiple of pixels that bucket edges have when the run says nothing else."""
    return edge_multiple(spec.data, facts)


def edge_multiple(data: Data, facts: FamilyFacts) -> int:
    """What `bucket_alignment` says, of the data alone."""
    if data.bucket_align is not None:
        return data.bucket_align
    if data.resolution < FINE_BELOW:
        return facts.pixel_multiple
    return math.lcm(COARSE_ALIGNMENT, facts.pixel_multiple)


def _flavour(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    flavour, known = spec.model.flavour, [flavour.name for flavour in facts.flavours]
    if flavour is not None and flavour not in known:
        yield refused("spec.model.flavour", flavour, choice(flavour, known))


def _resolution(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    align, data = bucket_alignment(spec, facts), spec.data
    if align % facts.pixel_multiple:
        allowed = f"must be a multiple of {facts.pixel_multiple} for {facts.name}, for example"
        yield refused("spec.data.bucketAlign", align, f"{allowed} {_round_up(align, facts.pixel_multiple)}")
    elif data.resolution < align:
        yield refused(
            "spec.data.resolution", data.resolution, f"must be at least {align}, the alignment of the buckets"
        )


def _frames(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    yield from _frame_rule("spec.data.clip.frames", spec.data.clip.frames, facts)
    if spec.validation.frames is not None:
        yield from _frame_rule("spec.validation.frames", spec.validation.frames, facts)


def _frame_rule(path: str, frames: int, facts: FamilyFacts) -> Iterator[Problem]:
    if facts.frame_rule is None:
        return
    modulus, remainder = facts.frame_rule
    if frames % modulus == remainder % modulus:
        return
    below = frames - (frames - remainder) % modulus
    examples = " or ".join(str(count) for count in (below, below + modulus) if count > 0)
    yield refused(path, frames, f"must be {modulus}n+{remainder} for {facts.name}, for example {examples}")


def _shown_frames(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    path, count = "spec.data.clip.shownFrames", spec.data.clip.shown_frames
    if not facts.continues:
        if count > 1:
            takers = " or ".join(name for name, other in FAMILIES.items() if other.continues)
            yield refused(path, count, f"{facts.name} continues no clips; remove it, or train {takers}")
        return
    yield from _frame_rule(path, count, facts)
    for place, frames in (
        ("spec.data.clip.frames", spec.data.clip.frames),
        ("spec.validation.frames", spec.validation.frames),
    ):
        if frames is not None and count >= frames:
            yield refused(path, count, f"must be less than {place}, which is {frames}")


def _fp32(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    numbers = spec.hyperparameters
    if not facts.needs_fp32:
        return
    if numbers.precision != "fp32":
        allowed = f"must be fp32 for {facts.name}: {facts.needs_fp32}"
        yield refused("spec.hyperparameters.precision", numbers.precision, allowed)
    if numbers.optimizer.type == "adamw-bf16":
        allowed = f"must be adamw for {facts.name}: {facts.needs_fp32}"
        yield refused("spec.hyperparameters.optimizer.type", numbers.optimizer.type, allowed)


def _vocabularies(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    if isinstance(spec.adapter, TextualInversionAdapter) and not facts.vocabularies:
        takers = " or ".join(name for name, other in FAMILIES.items() if other.vocabularies)
        yield refused("spec.adapter.type", spec.adapter.type, f"{facts.name} learns no new words; train {takers}")


def _validation_size(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    multiple = facts.pixel_multiple
    for name, value in (("width", spec.validation.width), ("height", spec.validation.height)):
        if value is not None and facts.sample_edge:
            yield refused(
                f"spec.validation.{name}", value, f"{facts.name} draws in a size that follows its reference; remove it"
            )
        elif value is not None and value % multiple:
            allowed = f"must be a multiple of {multiple} for {facts.name}, for example {_round_up(value, multiple)}"
            yield refused(f"spec.validation.{name}", value, allowed)


def _negative_prompts(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    kind, guidance = _guidance_of(spec, facts), spec.validation.guidance
    needs = f"does something only with spec.validation.guidance above {facts.guidance_above:g}"
    for index, prompt in enumerate(spec.validation.prompts):
        if not prompt.negative:
            continue
        path = f"spec.validation.prompts[{index}].negative"
        if not facts.negative_prompts:
            yield refused(path, prompt.negative, f"samples of {facts.name} know no negative prompt; remove it")
        elif kind == "distilled":
            others = [flavour.name for flavour in facts.flavours if flavour.guidance != "distilled"]
            way = f", or set spec.model.flavour to {' or '.join(others)} where the checkpoint is one" if others else ""
            allowed = f"samples of {facts.name} distilled on guidance know no negative prompt; remove it{way}"
            yield refused(path, prompt.negative, allowed)
        elif guidance is None and kind == "off":
            yield refused(path, prompt.negative, f"{needs}; set that")
        elif guidance is not None and guidance <= facts.guidance_above:
            yield refused(path, prompt.negative, f"{needs}, which is {guidance:g}")


def _pictures(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    """A run that names no flavour may have any of them: then the checkpoint tells, when training starts."""
    name = spec.model.flavour
    possible = [flavour for flavour in facts.flavours if name in (None, flavour.name)]
    kind = facts.name if name is None else f"{facts.name} {name}"
    for index, prompt in enumerate(spec.validation.prompts):
        for frame, uri in prompt.shown.items():
            path = f"spec.validation.prompts[{index}].{PICTURE_FIELDS[frame]}"
            if uri is not None and not any(frame in flavour.frames for flavour in possible):
                yield refused(path, uri, f"{kind} is not shown the {frame} frame of a clip; remove it")
            if uri is None and possible and all(frame in flavour.frames for flavour in possible):
                yield refused(path, uri, f"{kind} draws from a picture of the {frame} frame; name its file")


def _lyrics(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    for index, prompt in enumerate(spec.validation.prompts):
        if prompt.lyrics is not None and facts.modality != "audio":
            allowed = f"only for audio families, and {facts.name} is of {facts.modality}"
            yield refused(f"spec.validation.prompts[{index}].lyrics", prompt.lyrics, allowed)


def _kohya(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    formats = spec.publish.formats
    if isinstance(spec.adapter, LoraAdapter) and not facts.kohya and written("lora", formats) == ["kohya"]:
        allowed = f"kohya has no names for the layers of {facts.name}; must hold diffusers"
        yield refused("spec.publish.formats", formats, allowed)


def _references(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    """Samples are pairs, and pictures are drawn from references, where the family takes them; nowhere else are there any."""
    most = facts.references
    pairs = [(f"spec.data.sources[{i}].references", source.references) for i, source in enumerate(spec.data.sources)]
    prompts = [
        (f"spec.validation.prompts[{i}].references", p.references) for i, p in enumerate(spec.validation.prompts)
    ]
    for path, given in (*pairs, *prompts):
        if given and not most:
            takers = " or ".join(name for name, other in FAMILIES.items() if other.references)
            yield refused(path, given, f"{facts.name} takes no reference pictures; remove it, or train {takers}")
        elif most and not 1 <= len(given) <= most:
            number = "1" if most == 1 else f"1–{most}"
            what = "folder of reference pictures" if path.startswith("spec.data") else "reference picture"
            yield refused(path, given, f"must name {number} {what}{'' if most == 1 else 's'} for {facts.name}")


def _quantizable(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    kind, possible = spec.model.quantization, facts.quantizations
    if kind is None or kind in possible:
        return
    way = f"{facts.name} allows {', '.join(possible)}" if possible else f"the base of {facts.name} is not quantised"
    yield refused("spec.model.quantization", kind, f"{way}: {facts.quantization_doubt}")


def _tiled(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    tiling, reason = spec.model.autoencoder_tiling, facts.passages.untiled
    if tiling == "always" and reason:
        yield refused("spec.model.autoencoderTiling", tiling, f"must be auto or never for {facts.name}: {reason}")


def _control(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    if isinstance(spec.adapter, ControlNetAdapter) and facts.uncontrolled:
        takers = " or ".join(name for name, other in FAMILIES.items() if not other.uncontrolled)
        allowed = f"not for {facts.name}: {facts.uncontrolled}; train another type, or a model of {takers}"
        yield refused("spec.adapter.type", spec.adapter.type, allowed)


def _guidance_of(spec: TrainingRunSpec, facts: FamilyFacts) -> str:
    name = spec.model.flavour or facts.flavours[0].name
    return next((flavour.guidance for flavour in facts.flavours if flavour.name == name), "on")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


FAMILY_RULES: tuple[Callable[[TrainingRunSpec, FamilyFacts], Iterator[Problem]], ...] = (
    _flavour,
    _resolution,
    _frames,
    _shown_frames,
    _fp32,
    _validation_size,
    _negative_prompts,
    _pictures,
    _references,
    _control,
    _lyrics,
    _kohya,
    _quantizable,
    _tiled,
    _vocabularies,
)
