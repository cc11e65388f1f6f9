"""What the fields of a run must be to each other and to the model family. Pure; the CLI, the webhook and reconcile share it.

What CEL can see is in the CRD as well (`cel`); a test holds the two together.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from atelier_api.families import FAMILIES, FamilyFacts
from atelier_api.family_rules import FAMILY_RULES
from atelier_api.few_steps import few_step_family_rules, few_step_rules
from atelier_api.layouts import LAYOUTS, written
from atelier_api.options import unused
from atelier_api.problem import Problem, choice, refused, shown
from atelier_api.sliders import slider_notes, slider_rules
from atelier_api.technique_rules import TECHNIQUE_FAMILY_RULES, TECHNIQUE_RULES
from atelier_api.v1alpha1 import TrainingRun, TrainingRunSpec
from atelier_api.v1alpha1.adapter import (
    ControlNetAdapter,
    DyloraAdapter,
    FullAdapter,
    Ia3Adapter,
    LayerAdapter,
    LoraAdapter,
    TextualInversionAdapter,
    rebuilds_weights,
)
from atelier_api.v1alpha1.parallelism import DEEPSPEED

PRESETS = ("attention", "mlp", "all")
"""Names in `adapter.targets` that a family translates; everything else there is a regular expression."""

S3_URI = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^ ]*)?"
HUB_URI = r"hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@[A-Za-z0-9_./-]+)?"
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
"""Patterns that Python and RE2 read alike."""

FOLDER = "the folder of the pictures that go with the samples, each of the same name"
PICTURE = "the picture that this sample is drawn from"
SCALE = "how much of the control network counts, 1 as it was trained"
"""What a run of a control network has to name."""


def broken(run: TrainingRun) -> list[Problem]:
    """Every rule that the run breaks, in the order of the blocks."""
    spec = run.spec
    found = list(unknown_family({"spec": {"model": {"family": spec.model.family}}}))
    for rule in (*RULES, *TECHNIQUE_RULES):
        found.extend(rule(spec))
    facts = FAMILIES.get(spec.model.family)
    if facts is not None:
        for family_rule in (*FAMILY_RULES, *TECHNIQUE_FAMILY_RULES, few_step_family_rules):
            found.extend(family_rule(spec, facts))
    found.extend(unused(spec, facts))
    return found


def notes(run: TrainingRun) -> list[str]:
    """What the run asks for and will not get, or had better not, without being wrong: one sentence each."""
    facts, kind, formats = FAMILIES.get(run.spec.model.family), run.spec.adapter.type, run.spec.publish.formats
    return [*_format_notes(kind, formats, facts), *_quantization_notes(run.spec, facts), *slider_notes(run.spec)]


def _format_notes(kind: str, formats: Sequence[str], facts: FamilyFacts | None) -> list[str]:
    # Of a LoRA, `lycoris` goes without saying: it is in the default, and nobody waits for it.
    left_out = [layout for layout in formats if layout not in written(kind, formats) and layout != "lycoris"]
    if left_out and kind != "lora":
        is_out = "is left out; that layout does" if len(left_out) == 1 else "are left out; these layouts do"
        return [f"spec.publish.formats: {' and '.join(left_out)} {is_out} not hold an adapter of type {kind}"]
    if kind == "lora" and "kohya" in formats and facts is not None and not facts.kohya:
        return [f"spec.publish.formats: kohya is left out; that layout has no names for the layers of {facts.name}"]
    return []


def _quantization_notes(spec: TrainingRunSpec, facts: FamilyFacts | None) -> list[str]:
    quantization = spec.model.quantization
    if quantization is None or facts is None or not facts.quantization_doubt:
        return []
    return [f"spec.model.quantization {quantization} is not recommended for {facts.name}: {facts.quantization_doubt}"]


def unknown_family(document: object) -> Iterator[Problem]:
    """The problem of a family that there is not. Takes a raw document, so that it is told beside mistakes of other fields."""
    match document:
        case {"spec": {"model": {"family": str(family)}}} if family not in FAMILIES:
            yield refused("spec.model.family", family, choice(family, FAMILIES))


def picture_places(spec: TrainingRunSpec) -> Iterator[tuple[str, str]]:
    """Where pictures beside those that are trained are, with the path in the document: folders beside samples, files of prompts."""
    for index, source in enumerate(spec.data.sources):
        for field, uri in source.beside.items():
            yield f"spec.data.sources[{index}].{field}", uri
    yield from spec.validation.pictures.items()


def world_size(spec: TrainingRunSpec) -> int:
    """Processes of the run."""
    return spec.parallelism.nodes * processes_per_node(spec)


def processes_per_node(spec: TrainingRunSpec) -> int:
    """One per GPU; on the CPU what `processesPerNode` says."""
    return spec.parallelism.gpus_per_node or spec.parallelism.processes_per_node or 1


def _locations(spec: TrainingRunSpec) -> Iterator[Problem]:
    yield from _location("spec.model.source", spec.model.source, ("hf", "s3"))
    for index, source in enumerate(spec.data.sources):
        yield from _location(f"spec.data.sources[{index}].uri", source.uri, ("s3",))
    for path, uri in picture_places(spec):
        yield from _location(path, uri, ("s3",), is_file=path.startswith("spec.validation."))
    yield from _location("spec.storage.uri", spec.storage.uri, ("s3",))


def _location(path: str, uri: str, schemes: tuple[str, ...], *, is_file: bool = False) -> Iterator[Problem]:
    forms = {"s3": f"s3://bucket/{'key' if is_file else 'prefix'}", "hf": "hf://owner/name"}
    scheme = uri.partition("://")[0] if re.match(SCHEME, uri) else ""
    if scheme == "s3" and "s3" in schemes and not re.fullmatch(S3_URI, uri):
        yield refused(path, uri, f"must be {forms['s3']}, the bucket 3–63 lower-case letters, digits, '.' and '-'")
    elif scheme == "hf" and "hf" in schemes and not re.fullmatch(HUB_URI, uri):
        yield refused(path, uri, "must be hf://owner/name, with an optional @revision")
    elif scheme and scheme not in schemes:
        places = ["a file" if is_file else "a folder", *(forms[scheme] for scheme in schemes)]
        yield refused(path, uri, f"must be {' or '.join(places)}")


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
    if not isinstance(spec.adapter, LayerAdapter):
        return
    lists = {"targets": spec.adapter.targets}
    if isinstance(spec.adapter, Ia3Adapter):
        lists["inputTargets"] = spec.adapter.input_targets
    for name, targets in lists.items():
        for index, target in enumerate(targets):
            try:
                re.compile(target)
            except re.error as error:
                allowed = f"must be a preset ({', '.join(PRESETS)}) or a regular expression: {error}"
                yield refused(f"spec.adapter.{name}[{index}]", target, allowed)


def _rank_block(spec: TrainingRunSpec) -> Iterator[Problem]:
    adapter = spec.adapter
    if isinstance(adapter, DyloraAdapter) and adapter.rank % adapter.rank_block:
        allowed = f"must divide spec.adapter.rank, which is {adapter.rank}"
        yield refused("spec.adapter.rankBlock", adapter.rank_block, allowed)


def _tokens(spec: TrainingRunSpec) -> Iterator[Problem]:
    if not isinstance(spec.adapter, TextualInversionAdapter):
        return
    if not spec.adapter.tokens:
        yield refused("spec.adapter.tokens", [], "must have at least one placeholder, such as <pixel-knight>")
    names = [each.token for each in spec.adapter.tokens]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield refused(f"spec.adapter.tokens[{index}].token", name, "must differ from the others")


def _batch(spec: TrainingRunSpec) -> Iterator[Problem]:
    world, numbers = world_size(spec), spec.hyperparameters
    micro = numbers.micro_batch_size or 1
    if numbers.global_batch_size % (world * micro) == 0:
        return
    factors = f"{_counted(spec.parallelism.nodes, 'node')} × {_counted(processes_per_node(spec), 'process')}"
    factors += f" × microBatchSize {micro}" if micro > 1 else ""
    larger = -(-numbers.global_batch_size // (world * micro)) * world * micro
    allowed = f"must be a multiple of {world * micro} ({factors}), for example {larger}"
    yield refused("spec.hyperparameters.globalBatchSize", numbers.global_batch_size, allowed)


def _counted(number: int, what: str) -> str:
    """`1 node`, `2 processes`."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def _schedule(spec: TrainingRunSpec) -> Iterator[Problem]:
    schedule, steps = spec.hyperparameters.schedule, spec.hyperparameters.steps
    if schedule.warmup_steps > steps:
        path = "spec.hyperparameters.schedule.warmupSteps"
        yield refused(path, schedule.warmup_steps, f"must be at most spec.hyperparameters.steps, which is {steps}")


def _lengths(spec: TrainingRunSpec) -> Iterator[Problem]:
    audio = spec.data.audio
    if audio.min_seconds > audio.max_seconds:
        allowed = f"must be at most spec.data.audio.maxSeconds, which is {audio.max_seconds}"
        yield refused("spec.data.audio.minSeconds", audio.min_seconds, allowed)


def _precision(spec: TrainingRunSpec) -> Iterator[Problem]:
    numbers = spec.hyperparameters
    whole = {"full": "the whole fp32 model", "controlnet": "the copy of the fp32 model"}.get(spec.adapter.type)
    if whole and numbers.optimizer.type == "adamw-bf16" and numbers.precision == "fp32":
        allowed = (
            f"with adapter type {spec.adapter.type} it would round {whole} to bf16; set precision bf16, or type adamw"
        )
        yield refused("spec.hyperparameters.optimizer.type", numbers.optimizer.type, allowed)
    if rebuilds_weights(spec.adapter) and numbers.optimizer.type == "adamw-bf16":
        how = " with dora" if hasattr(spec.adapter, "dora") else ""
        allowed = (
            f"with adapter type {spec.adapter.type}{how} it would round the changed weights to bf16; set type adamw"
        )
        yield refused("spec.hyperparameters.optimizer.type", numbers.optimizer.type, allowed)


def _bridge(spec: TrainingRunSpec) -> Iterator[Problem]:
    """The flow objective of a diffusion family is a squared error with a weight of its own."""
    objective = spec.objective
    if objective.diff2_flow is None:
        return
    if objective.loss != "l2":
        yield refused("spec.objective.loss", objective.loss, "must be l2 with spec.objective.diff2Flow")
    if objective.min_snr_gamma is not None:
        allowed = "spec.objective.diff2Flow weighs the loss itself; remove the one or the other"
        yield refused("spec.objective.minSnrGamma", objective.min_snr_gamma, allowed)
    if objective.timesteps.shift == "dynamic":
        allowed = (
            "with spec.objective.diff2Flow it must be auto, none or a number: the checkpoint says nothing of tokens"
        )
        yield refused("spec.objective.timesteps.shift", objective.timesteps.shift, allowed)


def _quantization(spec: TrainingRunSpec) -> Iterator[Problem]:
    if spec.model.quantization is not None and isinstance(spec.adapter, FullAdapter):
        allowed = "with adapter type full the base itself is trained, which needs it whole; remove it, or set type lora"
        yield refused("spec.model.quantization", spec.model.quantization, allowed)


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


def _deepspeed(spec: TrainingRunSpec) -> Iterator[Problem]:
    """What DeepSpeed shards, and what is left to the other strategies."""
    path, strategy, quantization = "spec.parallelism.strategy", spec.parallelism.strategy, spec.model.quantization
    if strategy not in DEEPSPEED:
        return
    if world_size(spec) == 1:
        yield refused(path, strategy, "shards over the processes, and the run has 1; set more, or strategy single")
    if spec.hyperparameters.optimizer.type == "adamw-bf16":
        has_none = "spec.hyperparameters.optimizer.type is adamw-bf16"
        yield refused(path, strategy, f"trains fp32 weights, and {has_none}; set type adamw, or strategy fsdp2")
    if isinstance(spec.adapter, ControlNetAdapter):
        allowed = "trains no network beside its base, as spec.adapter.type controlnet does; set ddp or fsdp2"
        yield refused(path, strategy, allowed)
    if isinstance(spec.adapter, TextualInversionAdapter):
        allowed = "trains no words of text encoders, as spec.adapter.type textual-inversion does; set ddp or fsdp2"
        yield refused(path, strategy, allowed)
    if quantization is not None:
        packed = f"spec.model.quantization is {quantization}"
        yield refused(
            path, strategy, f"does not share out packed weights, and {packed}; remove that, or set ddp or fsdp2"
        )


def _conditioning(spec: TrainingRunSpec) -> Iterator[Problem]:
    """A control network needs a conditioning picture for each sample and for each prompt; nothing else has any."""
    controlled = isinstance(spec.adapter, ControlNetAdapter)
    prompts = list(enumerate(spec.validation.prompts))
    needed = [
        *(
            (f"data.sources[{i}].conditioning", source.conditioning, FOLDER)
            for i, source in enumerate(spec.data.sources)
        ),
        *((f"validation.prompts[{i}].conditioning", prompt.conditioning, PICTURE) for i, prompt in prompts),
        *((f"validation.prompts[{i}].conditioningScale", prompt.conditioning_scale, SCALE) for i, prompt in prompts),
    ]
    for path, value, what in needed:
        if controlled and value is None:
            yield refused(f"spec.{path}", value, f"adapter type controlnet needs it: {what}")
        elif not controlled and value is not None:
            yield refused(
                f"spec.{path}", value, f"only for adapter type controlnet, not {spec.adapter.type}; remove it"
            )


def _publish(spec: TrainingRunSpec) -> Iterator[Problem]:
    formats = spec.publish.formats
    if len(set(formats)) < len(formats):
        yield refused("spec.publish.formats", formats, "must name each format once")
    elif not written(spec.adapter.type, formats):
        needed = " or ".join(LAYOUTS[spec.adapter.type])
        allowed = f"none of these holds an adapter of type {spec.adapter.type}; must hold {needed}"
        yield refused("spec.publish.formats", formats, allowed)
    elif isinstance(spec.adapter, LoraAdapter) and spec.adapter.dora and "kohya" in formats:
        # diffusers drops the magnitudes of such a file, ComfyUI divides by another norm than DoRA does.
        allowed = "readers of kohya drop or misread the magnitudes of spec.adapter.dora; must be [diffusers]"
        yield refused("spec.publish.formats", formats, allowed)


RULES: tuple[Callable[[TrainingRunSpec], Iterator[Problem]], ...] = (
    _locations,
    _revision,
    _targets,
    _rank_block,
    _tokens,
    _sources_once,
    _batch,
    _schedule,
    _lengths,
    _precision,
    _bridge,
    _quantization,
    _processes,
    _deepspeed,
    _conditioning,
    slider_rules,
    few_step_rules,
    _publish,
)
