"""What the fields of a run must be to each other and to the model family. Pure; the CLI, the webhook and reconcile share it.

An option at its default counts as not given, because the API server fills in every default before anyone sees the object.
"""

import math
import re
from collections.abc import Callable, Iterator

from atelier_api.families import FAMILIES, FamilyFacts
from atelier_api.problem import Problem, choice, refused, shown
from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
from atelier_api.v1alpha1.adapter import FullAdapter, LoraAdapter
from atelier_api.v1alpha1.base import Block, format_decimal

PRESETS = ("attention", "mlp", "all")
"""Names in `adapter.targets` that a family translates; everything else there is a regular expression."""

S3_URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\S*)?")
HUB_URI = re.compile(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

FINE_BELOW = 512
COARSE_ALIGNMENT = 64


def broken(run: TrainingRun) -> list[Problem]:
    """Every rule that the run breaks, in the order of the blocks."""
    spec = run.spec
    found = list(unknown_family({"spec": {"model": {"family": spec.model.family}}}))
    for rule in RULES:
        found.extend(rule(spec))
    if spec.model.family in FAMILIES:
        for family_rule in FAMILY_RULES:
            found.extend(family_rule(spec, FAMILIES[spec.model.family]))
    return found


def notes(run: TrainingRun) -> list[str]:
    """What the run asks for and will not get, without being wrong: one sentence each."""
    if isinstance(run.spec.adapter, FullAdapter) and "kohya" in run.spec.publish.formats:
        return ["spec.publish.formats: kohya is left out; that layout is for LoRA, and spec.adapter.type is full"]
    return []


def unknown_family(document: object) -> Iterator[Problem]:
    """The problem of a family that there is not. Takes a raw document, so that it is told beside mistakes of other fields."""
    match document:
        case {"spec": {"model": {"family": str(family)}}} if family not in FAMILIES:
            yield refused("spec.model.family", family, choice(family, FAMILIES))


def bucket_alignment(spec: TrainingRunSpec, facts: FamilyFacts) -> int:
    """The multiple of pixels that bucket edges have when the run says nothing else."""
    if spec.data.bucket_align is not None:
        return spec.data.bucket_align
    if spec.data.resolution < FINE_BELOW:
        return facts.pixel_multiple
    return math.lcm(COARSE_ALIGNMENT, facts.pixel_multiple)


def world_size(spec: TrainingRunSpec) -> int:
    """Processes of the run."""
    return spec.parallelism.nodes * processes_per_node(spec)


def processes_per_node(spec: TrainingRunSpec) -> int:
    """One per GPU; on the CPU what `processesPerNode` says."""
    return spec.parallelism.gpus_per_node or spec.parallelism.processes_per_node or 1


# --- every family -----------------------------------------------------------------------------------------------------


def _locations(spec: TrainingRunSpec) -> Iterator[Problem]:
    yield from _location("spec.model.source", spec.model.source, ("hf",))
    for index, source in enumerate(spec.data.sources):
        yield from _location(f"spec.data.sources[{index}].uri", source.uri, ("s3",))
    yield from _location("spec.storage.uri", spec.storage.uri, ("s3",))


def _location(path: str, uri: str, schemes: tuple[str, ...]) -> Iterator[Problem]:
    forms = {"s3": "s3://bucket/prefix", "hf": "hf://owner/name"}
    scheme = uri.partition("://")[0] if SCHEME.match(uri) else ""
    if scheme == "s3" and "s3" in schemes and not S3_URI.fullmatch(uri):
        yield refused(path, uri, "must be s3://bucket/prefix, the bucket 3–63 lower-case letters, digits, '.' and '-'")
    elif scheme == "hf" and "hf" in schemes and not HUB_URI.fullmatch(uri):
        yield refused(path, uri, "must be hf://owner/name, with an optional @revision")
    elif scheme and scheme not in schemes:
        yield refused(path, uri, f"must be a folder or {' or '.join(forms[scheme] for scheme in schemes)}")


def _revision(spec: TrainingRunSpec) -> Iterator[Problem]:
    model = spec.model
    if model.revision is None:
        return
    if not model.source.startswith("hf://"):
        yield refused("spec.model.revision", model.revision, f"only an hf:// source has one, not {shown(model.source)}")
    elif "@" in model.source:
        yield refused(
            "spec.model.revision", model.revision, f"the source {shown(model.source)} names one too; keep one"
        )


def _sources_once(spec: TrainingRunSpec) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, source in enumerate(spec.data.sources):
        place = source.uri.rstrip("/")
        if place in first:
            allowed = f"sources[{first[place]}] is the same; to weigh it more, set its repeats"
            yield refused(f"spec.data.sources[{index}].uri", source.uri, allowed)
        first.setdefault(place, index)


def _targets(spec: TrainingRunSpec) -> Iterator[Problem]:
    if not isinstance(spec.adapter, LoraAdapter):
        return
    for index, target in enumerate(spec.adapter.targets):
        try:
            re.compile(target)
        except re.error as error:
            allowed = f"must be a preset ({', '.join(PRESETS)}) or a regular expression: {error}"
            yield refused(f"spec.adapter.targets[{index}]", target, allowed)


def _batch(spec: TrainingRunSpec) -> Iterator[Problem]:
    world, numbers = world_size(spec), spec.hyperparameters
    micro = numbers.micro_batch_size or 1
    if numbers.global_batch_size % (world * micro) == 0:
        return
    factors = f"{spec.parallelism.nodes} nodes × {processes_per_node(spec)} processes"
    factors += f" × microBatchSize {micro}" if micro > 1 else ""
    larger = -(-numbers.global_batch_size // (world * micro)) * world * micro
    allowed = f"must be a multiple of {world * micro} ({factors}), for example {larger}"
    yield refused("spec.hyperparameters.globalBatchSize", numbers.global_batch_size, allowed)


def _schedule(spec: TrainingRunSpec) -> Iterator[Problem]:
    schedule, steps = spec.hyperparameters.schedule, spec.hyperparameters.steps
    if schedule.warmup_steps > steps:
        path = "spec.hyperparameters.schedule.warmupSteps"
        yield refused(path, schedule.warmup_steps, f"must be at most spec.hyperparameters.steps, which is {steps}")


def _precision(spec: TrainingRunSpec) -> Iterator[Problem]:
    numbers = spec.hyperparameters
    full = isinstance(spec.adapter, FullAdapter)
    if full and numbers.optimizer.type == "adamw-bf16" and numbers.precision == "fp32":
        allowed = "with adapter type full it would round the whole fp32 model to bf16; set precision bf16, or type adamw"
        yield refused("spec.hyperparameters.optimizer.type", numbers.optimizer.type, allowed)


def _processes(spec: TrainingRunSpec) -> Iterator[Problem]:
    parallelism = spec.parallelism
    if parallelism.processes_per_node is not None and parallelism.gpus_per_node > 0:
        allowed = (
            f"only for gpusPerNode 0, which is {parallelism.gpus_per_node}; with GPUs there is one process for each"
        )
        yield refused("spec.parallelism.processesPerNode", parallelism.processes_per_node, allowed)
    if parallelism.strategy == "single" and world_size(spec) > 1:
        allowed = f"needs one process, and the run has {world_size(spec)}; use ddp or fsdp2"
        yield refused("spec.parallelism.strategy", parallelism.strategy, allowed)
    if parallelism.device_memory is not None and int(parallelism.device_memory[:-2]) == 0:
        yield refused("spec.parallelism.deviceMemory", parallelism.device_memory, 'must be more than 0, such as "80Gi"')


def _publish(spec: TrainingRunSpec) -> Iterator[Problem]:
    formats = spec.publish.formats
    if len(set(formats)) < len(formats):
        yield refused("spec.publish.formats", formats, "must name each format once")
    elif isinstance(spec.adapter, FullAdapter) and formats == ["kohya"]:
        yield refused(
            "spec.publish.formats", formats, "kohya is for LoRA; with adapter type full it must hold diffusers"
        )


def _unused(spec: TrainingRunSpec) -> Iterator[Problem]:
    """Options whose owner is off: they would do nothing."""
    objective, schedule = spec.objective, spec.hyperparameters.schedule
    if objective.loss != "huber":
        yield from _changed("spec.objective", objective, ("huber_c",), "only for loss huber")
    times = "spec.objective.timesteps"
    if objective.timesteps.sampling != "logit-normal":
        logit = ("logit_mean", "logit_scale")
        yield from _changed(times, objective.timesteps, logit, "only for sampling logit-normal")
    if objective.timesteps.sampling != "beta":
        yield from _changed(times, objective.timesteps, ("beta_a", "beta_b"), "only for sampling beta")
    path = "spec.hyperparameters.schedule"
    if schedule.type == "constant":
        yield from _changed(path, schedule, ("end",), "only for the types linear, cosine and polynomial")
    if schedule.type != "polynomial":
        yield from _changed(path, schedule, ("power",), "only for type polynomial")
    if not spec.validation.prompts:
        options = ("every_steps", "steps", "guidance", "width", "height", "frames")
        yield from _changed("spec.validation", spec.validation, options, "only with spec.validation.prompts")


def _changed(path: str, block: Block, options: tuple[str, ...], reason: str) -> Iterator[Problem]:
    """A problem for each option of the block that differs from its default."""
    for option in options:
        info = type(block).model_fields[option]
        value = getattr(block, option)
        if value != info.get_default(call_default_factory=True):
            plain = format_decimal(value) if isinstance(value, float) else value
            yield refused(f"{path}.{info.alias}", plain, reason)


RULES: tuple[Callable[[TrainingRunSpec], Iterator[Problem]], ...] = (
    _locations,
    _revision,
    _targets,
    _sources_once,
    _unused,
    _batch,
    _schedule,
    _precision,
    _processes,
    _publish,
)


# --- by family --------------------------------------------------------------------------------------------------------


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
    if facts.modality == "image":
        reason = f"only for video families, and {facts.name} makes pictures"
        yield from _changed("spec.data.clip", spec.data.clip, ("frames", "fps"), reason)
        yield from _changed("spec.validation", spec.validation, ("frames",), reason)
        return
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


def _objective(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    objective = spec.objective
    if facts.objective == "flow":
        reason = f"only for diffusion families, and {facts.name} is a flow family"
        yield from _changed("spec.objective", objective, ("prediction", "min_snr_gamma"), reason)
        yield from _changed("spec.objective.noise", objective.noise, ("offset", "zero_terminal_snr"), reason)
        return
    reason = f"only for flow families, and {facts.name} is a diffusion family"
    yield from _changed("spec.objective.timesteps", objective.timesteps, ("sampling", "shift"), reason)
    if objective.timesteps.sampling == "logit-normal":
        yield from _changed("spec.objective.timesteps", objective.timesteps, ("logit_mean", "logit_scale"), reason)
    if objective.noise.zero_terminal_snr and objective.prediction != "v":
        path = "spec.objective.noise.zeroTerminalSnr"
        yield refused(path, True, f"needs spec.objective.prediction v, which is {objective.prediction}")


def _validation_size(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    multiple = facts.pixel_multiple
    for name, value in (("width", spec.validation.width), ("height", spec.validation.height)):
        if value is not None and value % multiple:
            allowed = f"must be a multiple of {multiple} for {facts.name}, for example {_round_up(value, multiple)}"
            yield refused(f"spec.validation.{name}", value, allowed)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


FAMILY_RULES: tuple[Callable[[TrainingRunSpec, FamilyFacts], Iterator[Problem]], ...] = (
    _flavour,
    _resolution,
    _objective,
    _frames,
    _validation_size,
)
