"""The rules between fields as CEL, for the CRD: what the API server can check without us.

Every rule belongs to `spec` and names the field that it is about. Defaults are filled in before CEL runs, so a field with a default
is there; a field that may be null is absent when it is (`has`). Each has a twin in `rules`, which alone also knows whether a
target is a regular expression, and that `a/` and `a` are one folder. What families differ in is in `cel_families`.
"""

from collections.abc import Iterator

from atelier_api.cel_families import family_rules
from atelier_api.cel_few_steps import few_step_rules
from atelier_api.cel_rule import CelRule, folder_or_s3, literal, matches
from atelier_api.cel_techniques import technique_rules
from atelier_api.families import FAMILIES
from atelier_api.fields import MISSING
from atelier_api.layouts import LAYOUTS, LYCORIS
from atelier_api.options import ONLY, Only, node_at
from atelier_api.rules import HUB_URI, S3_URI, SCHEME
from atelier_api.sliders import NEEDED, NORMS
from atelier_api.v1alpha1.parallelism import DEEPSPEED
from atelier_api.v1alpha1.profile import EQUAL, NFS_PATH, ONE_KIND, VOLUME_KINDS
from atelier_api.v1alpha1.validation import PICTURE_FIELDS

WORLD = (
    "self.parallelism.nodes * (self.parallelism.gpusPerNode > 0 ? self.parallelism.gpusPerNode : "
    "(has(self.parallelism.processesPerNode) ? self.parallelism.processesPerNode : 1))"
)
MICRO = "(has(self.hyperparameters.microBatchSize) ? self.hyperparameters.microBatchSize : 1)"


def spec_rules() -> list[CelRule]:
    """All rules between the fields of a spec."""
    between = (_plain_rules, _location_rules, family_rules, technique_rules, few_step_rules, _option_rules)
    return [rule for rules in between for rule in rules()]


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
    yield from _deepspeed_rules()
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
    yield from _slider_rules()
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


def _deepspeed_rules() -> Iterator[CelRule]:
    other = f"!(self.parallelism.strategy in {literal(list(DEEPSPEED))})"
    fp32 = "self.hyperparameters.optimizer.type != 'adamw-bf16'"
    for rule, message in (
        (f"{WORLD} > 1", "shards over the processes, and the run has 1; set more, or strategy single"),
        (fp32, "trains fp32 weights, and adamw-bf16 has none; set type adamw, or strategy fsdp2"),
        ("self.adapter.type != 'controlnet'", "trains no network beside its base; set ddp or fsdp2"),
        ("self.adapter.type != 'textual-inversion'", "trains no words of text encoders; set ddp or fsdp2"),
        (
            "!has(self.model.quantization)",
            "does not share out packed weights; remove quantization, or set ddp or fsdp2",
        ),
    ):
        yield CelRule("parallelism.strategy", f"{other} || {rule}", f"DeepSpeed {message}")


def _format_rules() -> Iterator[CelRule]:
    """The layouts that hold an adapter."""
    for layouts in dict.fromkeys(LAYOUTS.values()):
        kinds = [kind for kind, held in LAYOUTS.items() if held == layouts]
        yield CelRule(
            "publish.formats",
            f"!(self.adapter.type in {literal(kinds)}) || "
            f"self.publish.formats.exists(format, format in {literal(list(layouts))})",
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
        f"self.adapter.type != 'controlnet' || self.model.family in {literal(takers)}",
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


def _slider_rules() -> Iterator[CelRule]:
    """Sliders, and samples at a strength."""
    slider = "(has(self.adapter.slider) && self.adapter.slider)"
    dora = "(has(self.adapter.dora) && self.adapter.dora)"
    yield CelRule("adapter.slider", f"!{slider} || !{dora}", NORMS)
    strong = "has(source.sliderStrength) && double(source.sliderStrength) != 0.0"
    yield CelRule("adapter.slider", f"!{slider} || self.data.sources.exists(source, {strong})", NEEDED)
    yield CelRule(
        "data.sources",
        f"{slider} || self.data.sources.all(source, !has(source.sliderStrength))",
        "sliderStrength is only for a slider; set spec.adapter.slider to true, or remove it",
    )
    yield CelRule(
        "validation.prompts",
        f"(self.adapter.type in {literal(['lora', *LYCORIS])} && !{dora}) || "
        "self.validation.prompts.all(prompt, !has(prompt.adapterStrength))",
        "adapterStrength is for adapters whose update is multiplied by a number, without dora",
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
            f"self.adapter.type in {literal(list(kinds))} || !({given})",
            f"{', '.join(names)} {'belong' if len(names) > 1 else 'belongs'} to type {' or '.join(kinds)}",
        )
    scaled = [kind for kind in LYCORIS if "dora" in variants[kind]]
    rotating = [kind for kind in LYCORIS if "blockSize" in variants[kind]]
    dora = f"(self.adapter.type in {literal(scaled)} && has(self.adapter.dora) && self.adapter.dora)"
    yield CelRule(
        "hyperparameters.optimizer.type",
        f"self.hyperparameters.optimizer.type != 'adamw-bf16' || !(self.adapter.type in {literal(rotating)} || {dora})",
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
    learning = literal([name for name, facts in FAMILIES.items() if facts.vocabularies])
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
        f"!{matches(source, SCHEME)} || {matches(source, HUB_URI, whole=True)} || {matches(source, S3_URI, whole=True)}",
        "must be a folder or hf://owner/name or s3://bucket/prefix",
    )
    yield CelRule(
        "model.revision",
        f"!has(self.model.revision) || ({source}.startsWith('hf://') && !{source}.contains('@'))",
        "only for an hf:// source without @revision",
    )
    message = "must be a folder or s3://bucket/prefix"
    yield CelRule("storage.uri", folder_or_s3("self.storage.uri"), message)
    yield CelRule("data.sources", f"self.data.sources.all(source, {folder_or_s3('source.uri')})", f"a uri {message}")
    sources = f"source.references.all(place, {folder_or_s3('place')})"
    yield CelRule("data.sources", f"self.data.sources.all(source, {sources})", f"references {message}")
    sources = f"(!has(source.conditioning) || {folder_or_s3('source.conditioning')})"
    yield CelRule("data.sources", f"self.data.sources.all(source, {sources})", f"conditioning {message}")
    prompts = [f"prompt.references.all(place, {folder_or_s3('place')})"]
    fields = (*PICTURE_FIELDS.values(), "conditioning")
    prompts += [f"(!has(prompt.{field}) || {folder_or_s3(f'prompt.{field}')})" for field in fields]
    for each in prompts:
        yield CelRule(
            "validation.prompts",
            f"self.validation.prompts.all(prompt, {each})",
            "pictures must be files or s3://bucket/key",
        )


def _option_rules() -> Iterator[CelRule]:
    for only in ONLY:
        owned = _owned(only) + (f" || has(self.{only.or_with})" if only.or_with else "")
        for option in only.options:
            yield CelRule(option, f"{owned} || {_is_default(option)}", only.reason)


def _owned(only: Only) -> str:
    if only.owner.startswith("family."):
        fact = only.owner.removeprefix("family.")
        names = [name for name, facts in FAMILIES.items() if getattr(facts, fact) in only.values]
        return f"self.model.family in {literal(names)}"
    if not only.values:
        return f"size(self.{only.owner}) > 0"
    return f"self.{only.owner} in {literal(list(only.values))}"


def _is_default(option: str) -> str:
    node, field = node_at(option), f"self.{option}"
    assert node.default is not MISSING
    if node.default is None:
        return f"!has({field})"
    if node.kind == "decimal":
        return f"double({field}) == {float(node.default)!r}"
    return f"{field} == {literal(node.default)}"
