"""The rules of `spec.techniques` as CEL, for the CRD. Their twins are in `technique_rules`."""

from collections.abc import Iterator

from atelier_api.cel_rule import CelRule, by_family, literal
from atelier_api.families import FAMILIES
from atelier_api.technique_rules import most_blocks

SYNC = "self.techniques.layerSync"


def technique_rules() -> Iterator[CelRule]:
    """Rules between the fields of the techniques, and to the family."""
    off, teacher = f"!has({SYNC})", f"{SYNC}.teacherBlock"
    field = "techniques.layerSync.teacherBlock"
    yield CelRule(
        field,
        f"{off} || {teacher} > {SYNC}.studentBlock",
        "must be more than studentBlock: a block learns from a later one",
    )
    message = "must be less than the number of blocks that the tokens of what is drawn go through"
    largest = {name: most_blocks(facts, None) for name, facts in FAMILIES.items()}
    yield CelRule(field, f"{off} || {teacher} < {by_family(largest)}", message)
    for name, facts in FAMILIES.items():
        smaller = {each.name: each.picture_blocks for each in facts.flavours if each.picture_blocks < largest[name]}
        for blocks in sorted(set(smaller.values())):
            named = literal([flavour for flavour, count in smaller.items() if count == blocks])
            other = f"self.model.family != '{name}' || !has(self.model.flavour) || !(self.model.flavour in {named})"
            yield CelRule(field, f"{off} || {other} || {teacher} < {blocks}", message)
