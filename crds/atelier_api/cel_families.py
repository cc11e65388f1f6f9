"""What families allow, as CEL; each rule has a twin in `family_rules`."""

from collections.abc import Iterator

from atelier_api.cel_rule import CelRule, by_family, literal
from atelier_api.families import FAMILIES
from atelier_api.family_rules import COARSE_ALIGNMENT, FINE_BELOW
from atelier_api.quantizations import QUANTIZATIONS
from atelier_api.v1alpha1.validation import PICTURE_FIELDS


def family_rules() -> Iterator[CelRule]:
    multiple = by_family({name: facts.pixel_multiple for name, facts in FAMILIES.items()})
    flavours = literal({name: [flavour.name for flavour in facts.flavours] for name, facts in FAMILIES.items()})
    known = f"self.model.flavour in {flavours}[self.model.family]"
    yield CelRule("model.flavour", f"!has(self.model.flavour) || {known}", "no flavour of this family")
    following = literal([name for name, facts in FAMILIES.items() if facts.sample_edge])
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
    exact = literal([name for name, facts in FAMILIES.items() if facts.needs_fp32])
    for field, value in (("precision", "fp32"), ("optimizer.type", "adamw")):
        yield CelRule(
            f"hyperparameters.{field}",
            f"!(self.model.family in {exact}) || self.hyperparameters.{field} == '{value}'",
            f"must be {value} for a family that is trained in fp32 alone",
        )
    named = literal([name for name, facts in FAMILIES.items() if facts.kohya])
    yield CelRule(
        "publish.formats",
        f"self.adapter.type != 'lora' || self.model.family in {named} || "
        "self.publish.formats.exists(format, format == 'diffusers')",
        "kohya has no names for the layers of this family; must hold diffusers",
    )
    yield from _quantization_rules()
    yield from _tiling_rules()
    yield from _negative_prompt_rules()
    yield from _picture_rules()
    yield from _reference_rules()
    sung = literal([name for name, facts in FAMILIES.items() if facts.modality == "audio"])
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
    continuing = literal([name for name, facts in FAMILIES.items() if facts.continues])
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
            allowed += f" || self.model.quantization in {literal(list(possible))}"
        way = f"{name} allows {', '.join(possible)}" if possible else f"the base of {name} is not quantised"
        yield CelRule(
            "model.quantization",
            f"self.model.family != '{name}' || {allowed}",
            f"{way}: {facts.quantization_doubt}",
        )


def _tiling_rules() -> Iterator[CelRule]:
    """The families whose autoencoder does not work on tiles."""
    for name, facts in FAMILIES.items():
        if facts.passages.untiled:
            yield CelRule(
                "model.autoencoderTiling",
                f"self.model.family != '{name}' || self.model.autoencoderTiling != 'always'",
                f"must be auto or never for {name}: {facts.passages.untiled}",
            )


def _negative_prompt_rules() -> Iterator[CelRule]:
    none = "self.validation.prompts.all(prompt, !has(prompt.negative) || prompt.negative == '')"
    least = by_family({name: facts.guidance_above for name, facts in FAMILIES.items()})
    strong = f"has(self.validation.guidance) && double(self.validation.guidance) > {least}"
    learnt = literal([name for name, facts in FAMILIES.items() if not facts.negative_prompts])
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
            is_kind = f"(has(self.model.flavour) ? self.model.flavour in {literal(flavours)} : {unnamed})"
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
            other, shown = f"self.model.family != '{name}'", f"self.model.flavour in {literal(flavours)}"
            yield CelRule("validation.prompts", f"{other} || !{named} || {shown} || {none}", unused)
            always = "true" if len(flavours) == len(facts.flavours) else "false"
            yield CelRule("validation.prompts", f"{other} || !({named} ? {shown} : {always}) || {every}", missing)
        yield CelRule("validation.prompts", f"self.model.family in {literal(families)} || {none}", unused)


def _reference_rules() -> Iterator[CelRule]:
    takers = {name: facts.references for name, facts in FAMILIES.items() if facts.references}
    named = literal(list(takers))
    for field, item, what in (
        ("data.sources", "source", "folders of reference pictures"),
        ("validation.prompts", "prompt", "reference pictures"),
    ):
        none = f"self.{field}.all({item}, size({item}.references) == 0)"
        yield CelRule(field, f"self.model.family in {named} || {none}", "this family takes no reference pictures")
        for most in sorted(set(takers.values())):
            alike = literal([name for name, each in takers.items() if each == most])
            fits = f"self.{field}.all({item}, size({item}.references) >= 1 && size({item}.references) <= {most})"
            yield CelRule(field, f"!(self.model.family in {alike}) || {fits}", f"must name 1 to {most} {what}")
