"""The rules between fields as CEL, for the CRD: what the API server can check without us.

Every rule belongs to `spec` and names the field that it is about. Defaults are filled in before CEL runs, so a field with a default
is there; a field that may be null is absent when it is (`has`). Each has a twin in `rules`, which alone also knows whether a
target is a regular expression, and that `a/` and `a` are one folder.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from atelier_api.families import FAMILIES
from atelier_api.family_rules import COARSE_ALIGNMENT, FINE_BELOW
from atelier_api.fields import MISSING
from atelier_api.layouts import LAYOUTS, LYCORIS
from atelier_api.options import ONLY, Only, node_at
from atelier_api.quantizations import QUANTIZATIONS
from atelier_api.rules import HUB_URI, S3_URI, SCHEME
from atelier_api.v1alpha1.profile import EQUAL, NFS_PATH, ONE_KIND, VOLUME_KINDS
from atelier_api.v1alpha1.validation import PICTURE_FIELDS

WORLD = (
    "self.parallelism.nodes * (self.parallelism.gpusPerNode > 0 ? self.parallelism.gpusPerNode : "
    "(has(self.parallelism.processesPerNode) ? self.parallelism.processesPerNode : 1))"
)
MICRO = "(has(self.hyperparameters.microBatchSize) ? self.hyperparameters.microBatchSize : 1)"


@dataclass(frozen=True)
class CelRule:
    """A condition that must be true of `self`, the spec. `field` is the path below spec that the message is about."""

    field: str
    rule: str
    message: str


def spec_rules() -> list[CelRule]:
    """All rules between the fields of a spec."""
    return [*_plain_rules(), *_location_rules(), *_family_rules(), *_option_rules()]


def profile_rules() -> list[CelRule]:
    """All rules between the fields of a profile's spec. Their twins are the validators of the types."""
    kinds = ", ".join(f"has(volume.{kind})" for kind in VOLUME_KINDS)
    equal = "has(taint.key) && has(taint.value)"
    tolerated = f"gpu.tolerations.all(taint, taint.operator == 'Equal' ? {equal} : !has(taint.value))"
    return [
        CelRule("volumes", f"self.volumes.all(volume, [{kinds}].filter(given, given).size() == 1)", ONE_KIND),
        CelRule("volumes", "self.volumes.all(volume, !has(volume.nfsPath) || has(volume.nfsServer))", NFS_PATH),
        CelRule("gpuClasses", f"self.gpuClasses.all(gpu, {tolerated})", EQUAL),
    ]


def _plain_rules() -> Iterator[CelRule]:
    checkpoint = "self.storage.checkpoint"
    yield CelRule(
        "storage.checkpoint",
        f"{checkpoint}.everySteps > 0 || {checkpoint}.everySeconds > 0",
        "everySteps and everySeconds are both 0; at least one must be positive",
    )
    yield from _adapter_rules()
    yield CelRule(
        "parallelism.processesPerNode",
        "!has(self.parallelism.processesPerNode) || self.parallelism.gpusPerNode == 0",
        "only for gpusPerNode 0; with GPUs there is one process for each",
    )
    yield CelRule(
        "parallelism.strategy",
        f"self.parallelism.strategy != 'single' || {WORLD} == 1",
        "single needs one process; use ddp or fsdp2",
    )
    yield CelRule(
        "parallelism.deviceMemory",
        "!has(self.parallelism.deviceMemory) || self.parallelism.deviceMemory.matches('[1-9]')",
        'must be more than 0, such as "80Gi"',
    )
    yield CelRule(
        "hyperparameters.globalBatchSize",
        f"self.hyperparameters.globalBatchSize % ({WORLD} * {MICRO}) == 0",
        "must be a multiple of nodes × processes per node × microBatchSize",
    )
    yield CelRule(
        "hyperparameters.schedule.warmupSteps",
        "self.hyperparameters.schedule.warmupSteps <= self.hyperparameters.steps",
        "must be at most spec.hyperparameters.steps",
    )
    yield CelRule(
        "data.audio.minSeconds",
        "self.data.audio.minSeconds <= self.data.audio.maxSeconds",
        "must be at most spec.data.audio.maxSeconds",
    )
    yield CelRule(
        "hyperparameters.optimizer.type",
        "!(self.adapter.type in ['full', 'controlnet']) || self.hyperparameters.optimizer.type != 'adamw-bf16' || "
        "self.hyperparameters.precision != 'fp32'",
        "with adapter type full and controlnet, adamw-bf16 needs precision bf16",
    )
    yield CelRule(
        "model.quantization",
        "!has(self.model.quantization) || self.adapter.type != 'full'",
        "with adapter type full the base itself is trained; remove it, or set type lora",
    )
    yield from _bridge_rules()
    yield from _conditioning_rules()
    yield from _format_rules()


def _bridge_rules() -> Iterator[CelRule]:
    """What the flow objective of a diffusion family leaves no room for."""
    for field, rule, message in (
        ("loss", "self.objective.loss == 'l2'", "must be l2 with spec.objective.diff2Flow"),
        ("minSnrGamma", "!has(self.objective.minSnrGamma)", "spec.objective.diff2Flow weighs the loss itself"),
        (
            "timesteps.shift",
            "self.objective.timesteps.shift != 'dynamic'",
            "no dynamic shift with spec.objective.diff2Flow",
        ),
    ):
        yield CelRule(f"objective.{field}", f"!has(self.objective.diff2Flow) || {rule}", message)


def _format_rules() -> Iterator[CelRule]:
    """The layouts that hold an adapter."""
    for layouts in dict.fromkeys(LAYOUTS.values()):
        kinds = [kind for kind, held in LAYOUTS.items() if held == layouts]
        yield CelRule(
            "publish.formats",
            f"!(self.adapter.type in {_literal(kinds)}) || "
            f"self.publish.formats.exists(format, format in {_literal(list(layouts))})",
            f"none of these holds an adapter of type {' or '.join(kinds)}; must hold {' or '.join(layouts)}",
        )
    yield CelRule(
        "publish.formats",
        "self.adapter.type != 'lora' || !has(self.adapter.dora) || !self.adapter.dora || "
        "!self.publish.formats.exists(format, format == 'kohya')",
        "readers of kohya drop or misread the magnitudes of spec.adapter.dora; must be [diffusers]",
    )


def _conditioning_rules() -> Iterator[CelRule]:
    takers = [name for name, facts in FAMILIES.items() if not facts.uncontrolled]
    yield CelRule(
        "adapter.type",
        f"self.adapter.type != 'controlnet' || self.model.family in {_literal(takers)}",
        f"controlnet is for {', '.join(takers)}",
    )
    controlled = "self.adapter.type == 'controlnet'"
    for field, item, name in (
        ("data.sources", "source", "conditioning"),
        ("validation.prompts", "prompt", "conditioning"),
        ("validation.prompts", "prompt", "conditioningScale"),
    ):
        yield CelRule(
            field,
            f"self.{field}.all({item}, has({item}.{name}) == ({controlled}))",
            f"{name} is needed for adapter type controlnet, and only there",
        )


def _adapter_rules() -> Iterator[CelRule]:
    """Which type has which field, and what the types of lycoris-lora need."""
    variants = node_at("adapter").variants
    owners = {
        name: tuple(kind for kind, names in variants.items() if name in names)
        for name in node_at("adapter").fields
        if name != "type"
    }
    for kinds in dict.fromkeys(owners.values()):
        names = [name for name, owning in owners.items() if owning == kinds]
        given = " || ".join(f"has(self.adapter.{name})" for name in names)
        yield CelRule(
            "adapter",
            f"self.adapter.type in {_literal(list(kinds))} || !({given})",
            f"{', '.join(names)} {'belong' if len(names) > 1 else 'belongs'} to type {' or '.join(kinds)}",
        )
    scaled = [kind for kind in LYCORIS if "dora" in variants[kind]]
    rotating = [kind for kind in LYCORIS if "blockSize" in variants[kind]]
    dora = f"(self.adapter.type in {_literal(scaled)} && has(self.adapter.dora) && self.adapter.dora)"
    yield CelRule(
        "hyperparameters.optimizer.type",
        f"self.hyperparameters.optimizer.type != 'adamw-bf16' || !(self.adapter.type in {_literal(rotating)} || {dora})",
        f"with {', '.join(rotating)} and dora of {', '.join(scaled)}, adamw-bf16 would round the changed weights to bf16",
    )
    rank, block = (_given_or_default(name, "dylora") for name in ("rank", "rankBlock"))
    yield CelRule(
        "adapter.rankBlock",
        f"self.adapter.type != 'dylora' || {rank} % {block} == 0",
        "must divide spec.adapter.rank",
    )
    inverting = "self.adapter.type == 'textual-inversion'"
    named = "has(self.adapter.tokens) && size(self.adapter.tokens) > 0"
    yield CelRule("adapter.tokens", f"!({inverting}) || ({named})", "must have at least one placeholder")
    once = "self.adapter.tokens.all(each, self.adapter.tokens.exists_one(other, other.token == each.token))"
    yield CelRule(
        "adapter.tokens", f"!({inverting}) || !has(self.adapter.tokens) || {once}", "must name each placeholder once"
    )
    learning = _literal([name for name, facts in FAMILIES.items() if facts.vocabularies])
    yield CelRule(
        "adapter.type", f"!({inverting}) || self.model.family in {learning}", "this family learns no new words"
    )


def _given_or_default(name: str, kind: str) -> str:
    """A field of the adapter, whose defaults depend on its type and are not filled in."""
    node = node_at("adapter").fields[name]
    return f"(has(self.adapter.{name}) ? self.adapter.{name} : {node.defaults.get(kind, node.default)})"


def _location_rules() -> Iterator[CelRule]:
    source = "self.model.source"
    yield CelRule(
        "model.source",
        f"!{_matches(source, SCHEME)} || {_matches(source, HUB_URI, whole=True)} || {_matches(source, S3_URI, whole=True)}",
        "must be a folder or hf://owner/name or s3://bucket/prefix",
    )
    yield CelRule(
        "model.revision",
        f"!has(self.model.revision) || ({source}.startsWith('hf://') && !{source}.contains('@'))",
        "only for an hf:// source without @revision",
    )
    message = "must be a folder or s3://bucket/prefix"
    yield CelRule("storage.uri", _folder_or_s3("self.storage.uri"), message)
    yield CelRule("data.sources", f"self.data.sources.all(source, {_folder_or_s3('source.uri')})", f"a uri {message}")
    sources = f"source.references.all(place, {_folder_or_s3('place')})"
    yield CelRule("data.sources", f"self.data.sources.all(source, {sources})", f"references {message}")
    sources = f"(!has(source.conditioning) || {_folder_or_s3('source.conditioning')})"
    yield CelRule("data.sources", f"self.data.sources.all(source, {sources})", f"conditioning {message}")
    prompts = [f"prompt.references.all(place, {_folder_or_s3('place')})"]
    fields = (*PICTURE_FIELDS.values(), "conditioning")
    prompts += [f"(!has(prompt.{field}) || {_folder_or_s3(f'prompt.{field}')})" for field in fields]
    for each in prompts:
        yield CelRule(
            "validation.prompts",
            f"self.validation.prompts.all(prompt, {each})",
            "pictures must be files or s3://bucket/key",
        )


def _family_rules() -> Iterator[CelRule]:
    multiple = _by_family({name: facts.pixel_multiple for name, facts in FAMILIES.items()})
    flavours = _literal({name: [flavour.name for flavour in facts.flavours] for name, facts in FAMILIES.items()})
    known = f"self.model.flavour in {flavours}[self.model.family]"
    yield CelRule("model.flavour", f"!has(self.model.flavour) || {known}", "no flavour of this family")
    following = _literal([name for name, facts in FAMILIES.items() if facts.sample_edge])
    for side in ("width", "height"):
        free = f"!has(self.validation.{side}) || !(self.model.family in {following})"
        yield CelRule(f"validation.{side}", free, "this family draws in a size that follows its reference")
    aligned = f"(!has(self.data.bucketAlign) || self.data.bucketAlign % {multiple} == 0)"
    yield CelRule("data.bucketAlign", aligned, "must be a multiple of the family's pixels")
    coarse = f"(self.data.resolution < {FINE_BELOW} ? {multiple} : {COARSE_ALIGNMENT})"
    yield CelRule(
        "data.resolution",
        f"!{aligned} || self.data.resolution >= (has(self.data.bucketAlign) ? self.data.bucketAlign : {coarse})",
        "must be at least the alignment of the buckets",
    )
    for side in ("width", "height"):
        field = f"self.validation.{side}"
        message = "must be a multiple of the family's pixels"
        yield CelRule(f"validation.{side}", f"!has({field}) || {field} % {multiple} == 0", message)
    exact = _literal([name for name, facts in FAMILIES.items() if facts.needs_fp32])
    for field, value in (("precision", "fp32"), ("optimizer.type", "adamw")):
        yield CelRule(
            f"hyperparameters.{field}",
            f"!(self.model.family in {exact}) || self.hyperparameters.{field} == '{value}'",
            f"must be {value} for a family that is trained in fp32 alone",
        )
    named = _literal([name for name, facts in FAMILIES.items() if facts.kohya])
    yield CelRule(
        "publish.formats",
        f"self.adapter.type != 'lora' || self.model.family in {named} || "
        "self.publish.formats.exists(format, format == 'diffusers')",
        "kohya has no names for the layers of this family; must hold diffusers",
    )
    yield from _quantization_rules()
    yield from _negative_prompt_rules()
    yield from _picture_rules()
    yield from _reference_rules()
    sung = _literal([name for name, facts in FAMILIES.items() if facts.modality == "audio"])
    silent = "self.validation.prompts.all(prompt, !has(prompt.lyrics))"
    yield CelRule("validation.prompts", f"self.model.family in {sung} || {silent}", "lyrics are for audio families")
    yield from _frame_rules()


def _frame_rules() -> Iterator[CelRule]:
    """How many frames a clip has, and how many of them are shown."""
    for name, facts in FAMILIES.items():
        if facts.frame_rule is None:
            continue
        modulus, remainder = facts.frame_rule
        other, message = f"self.model.family != '{name}'", f"must be {modulus}n+{remainder} for {name}"
        fits = f"% {modulus} == {remainder % modulus}"
        yield CelRule("data.clip.frames", f"{other} || self.data.clip.frames {fits}", message)
        frames = "self.validation.frames"
        yield CelRule("validation.frames", f"{other} || !has({frames}) || {frames} {fits}", message)
        if facts.continues:
            shown = "self.data.clip.shownFrames"
            fewer = f"{shown} < self.data.clip.frames && (!has({frames}) || {shown} < {frames})"
            yield CelRule("data.clip.shownFrames", f"{other} || {shown} {fits}", message)
            yield CelRule(
                "data.clip.shownFrames",
                f"{other} || ({fewer})",
                "must be less than spec.data.clip.frames and spec.validation.frames",
            )
    continuing = _literal([name for name, facts in FAMILIES.items() if facts.continues])
    yield CelRule(
        "data.clip.shownFrames",
        f"self.data.clip.shownFrames == 1 || self.model.family in {continuing}",
        "this family continues no clips",
    )


def _quantization_rules() -> Iterator[CelRule]:
    """The families whose base may not be kept in every kind."""
    for name, facts in FAMILIES.items():
        if facts.quantizations == QUANTIZATIONS:
            continue
        possible = facts.quantizations
        allowed = "!has(self.model.quantization)"
        if possible:
            allowed += f" || self.model.quantization in {_literal(list(possible))}"
        way = f"{name} allows {', '.join(possible)}" if possible else f"the base of {name} is not quantised"
        yield CelRule(
            "model.quantization",
            f"self.model.family != '{name}' || {allowed}",
            f"{way}: {facts.quantization_doubt}",
        )


def _negative_prompt_rules() -> Iterator[CelRule]:
    none = "self.validation.prompts.all(prompt, !has(prompt.negative) || prompt.negative == '')"
    least = _by_family({name: facts.guidance_above for name, facts in FAMILIES.items()})
    strong = f"has(self.validation.guidance) && double(self.validation.guidance) > {least}"
    learnt = _literal([name for name, facts in FAMILIES.items() if not facts.negative_prompts])
    yield CelRule(
        "validation.prompts",
        f"!(self.model.family in {learnt}) || {none}",
        "samples of this family know no negative prompt",
    )
    above = "a negative prompt does something only with spec.validation.guidance above what switches it on"
    yield CelRule("validation.prompts", f"!has(self.validation.guidance) || {strong} || {none}", above)
    for kind, otherwise, message in (
        ("distilled", none, "samples of a checkpoint that is distilled on guidance know no negative prompt"),
        ("off", f"({strong}) || {none}", above),
    ):
        for name, facts in FAMILIES.items():
            flavours = [flavour.name for flavour in facts.flavours if flavour.guidance == kind]
            if not flavours:
                continue
            unnamed = "true" if facts.flavours[0].guidance == kind else "false"
            is_kind = f"(has(self.model.flavour) ? self.model.flavour in {_literal(flavours)} : {unnamed})"
            yield CelRule("validation.prompts", f"self.model.family != '{name}' || !{is_kind} || {otherwise}", message)


def _picture_rules() -> Iterator[CelRule]:
    named = "has(self.model.flavour)"
    for frame, field in PICTURE_FIELDS.items():
        none = f"self.validation.prompts.all(prompt, !has(prompt.{field}))"
        every = f"self.validation.prompts.all(prompt, has(prompt.{field}))"
        unused, missing = f"{field} is for checkpoints that are shown the {frame} frame", f"needs {field}"
        families = []
        for name, facts in FAMILIES.items():
            flavours = [flavour.name for flavour in facts.flavours if frame in flavour.frames]
            if not flavours:
                continue
            families.append(name)
            other, shown = f"self.model.family != '{name}'", f"self.model.flavour in {_literal(flavours)}"
            yield CelRule("validation.prompts", f"{other} || !{named} || {shown} || {none}", unused)
            always = "true" if len(flavours) == len(facts.flavours) else "false"
            yield CelRule("validation.prompts", f"{other} || !({named} ? {shown} : {always}) || {every}", missing)
        yield CelRule("validation.prompts", f"self.model.family in {_literal(families)} || {none}", unused)


def _reference_rules() -> Iterator[CelRule]:
    takers = {name: facts.references for name, facts in FAMILIES.items() if facts.references}
    named = _literal(list(takers))
    for field, item, what in (
        ("data.sources", "source", "folders of reference pictures"),
        ("validation.prompts", "prompt", "reference pictures"),
    ):
        none = f"self.{field}.all({item}, size({item}.references) == 0)"
        yield CelRule(field, f"self.model.family in {named} || {none}", "this family takes no reference pictures")
        for most in sorted(set(takers.values())):
            alike = _literal([name for name, each in takers.items() if each == most])
            fits = f"self.{field}.all({item}, size({item}.references) >= 1 && size({item}.references) <= {most})"
            yield CelRule(field, f"!(self.model.family in {alike}) || {fits}", f"must name 1 to {most} {what}")


def _option_rules() -> Iterator[CelRule]:
    for only in ONLY:
        owned = _owned(only) + (f" || has(self.{only.or_with})" if only.or_with else "")
        for option in only.options:
            yield CelRule(option, f"{owned} || {_is_default(option)}", only.reason)


def _owned(only: Only) -> str:
    if only.owner.startswith("family."):
        fact = only.owner.removeprefix("family.")
        names = [name for name, facts in FAMILIES.items() if getattr(facts, fact) in only.values]
        return f"self.model.family in {_literal(names)}"
    if not only.values:
        return f"size(self.{only.owner}) > 0"
    return f"self.{only.owner} in {_literal(list(only.values))}"


def _is_default(option: str) -> str:
    node, field = node_at(option), f"self.{option}"
    assert node.default is not MISSING
    if node.default is None:
        return f"!has({field})"
    if node.kind == "decimal":
        return f"double({field}) == {float(node.default)!r}"
    return f"{field} == {_literal(node.default)}"


def _by_family(values: dict[str, float]) -> str:
    """The number of the run's family. Few numbers are told apart by names: a map of all families would be built at each use."""
    common, *others = (value for value, _ in Counter(values.values()).most_common())
    cases = [
        f"self.model.family in {_literal([name for name, each in values.items() if each == value])} ? {_literal(value)} : "
        for value in others
    ]
    return f"({''.join(cases)}{_literal(common)})" if cases else _literal(common)


def _folder_or_s3(field: str) -> str:
    return f"(!{_matches(field, SCHEME)} || {_matches(field, S3_URI, whole=True)})"


def _matches(field: str, pattern: str, *, whole: bool = False) -> str:
    """`matches` finds a pattern anywhere, so both ends are anchored where they count."""
    return f"{field}.matches({_literal(f'^({pattern})' + ('$' if whole else ''))})"


def _literal(value: Any) -> str:
    """A value as a CEL literal, with single quotes: JSON otherwise."""
    if isinstance(value, str):
        return "'" + json.dumps(value)[1:-1].replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
