"""What the fields of `spec.techniques` must be to each other and to the model family: `rules` applies them. Pure."""

from collections.abc import Callable, Iterator

from atelier_api.families import FamilyFacts
from atelier_api.problem import Problem, refused
from atelier_api.v1alpha1 import TrainingRunSpec

TEACHER = "spec.techniques.layerSync.teacherBlock"


def most_blocks(facts: FamilyFacts, flavour: str | None) -> int:
    """Blocks that the tokens of what is drawn go through: of the flavour, or where it is not known of the largest one."""
    named = [each for each in facts.flavours if each.name == flavour]
    return max(each.picture_blocks for each in named or facts.flavours)


def block_number(teacher: int, blocks: int, whose: str) -> Iterator[Problem]:
    """The problem of a teacher beyond the last of so many blocks of `whose` network. A student is before its teacher."""
    if teacher >= blocks:
        allowed = f"must be at most {blocks - 1}: the tokens of what is drawn go through {blocks} blocks of {whose}, the first is 0"
        yield refused(TEACHER, teacher, allowed)


def _block_order(spec: TrainingRunSpec) -> Iterator[Problem]:
    sync = spec.techniques.layer_sync
    if sync is not None and sync.teacher_block <= sync.student_block:
        allowed = f"must be more than studentBlock, which is {sync.student_block}: a block learns from a later one"
        yield refused(TEACHER, sync.teacher_block, allowed)


def _block_number(spec: TrainingRunSpec, facts: FamilyFacts) -> Iterator[Problem]:
    sync, flavour = spec.techniques.layer_sync, spec.model.flavour
    if sync is None:
        return
    named = flavour in [each.name for each in facts.flavours]
    whose = f"{facts.name} {flavour}" if named else facts.name
    yield from block_number(sync.teacher_block, most_blocks(facts, flavour), whose)


TECHNIQUE_RULES: tuple[Callable[[TrainingRunSpec], Iterator[Problem]], ...] = (_block_order,)
TECHNIQUE_FAMILY_RULES: tuple[Callable[[TrainingRunSpec, FamilyFacts], Iterator[Problem]], ...] = (_block_number,)
