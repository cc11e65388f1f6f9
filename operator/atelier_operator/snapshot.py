"""What an attempt was made from, kept beside its RunFile: another attempt is made from the same, whatever has been edited since."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError

from atelier_api.transitions import MUTABLE
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.profile import TrainingProfileSpec
from atelier_operator.names import SNAPSHOT_KEY


class Snapshot(Block):
    """The profile, and the spec as the user wrote it. Fields that this version does not know are another version's."""

    model_config = ConfigDict(extra="ignore")

    profile: TrainingProfileSpec
    spec: TrainingRunSpec


def text_of(snapshot: Snapshot) -> str:
    """As it is kept in the attempt's ConfigMap."""
    return snapshot.model_dump_json(by_alias=True, exclude_none=True)


def read(config_map: Mapping[str, Any] | None) -> Snapshot | None:
    """The snapshot in an attempt's ConfigMap; None where there is none that can be read."""
    text = ((config_map or {}).get("data") or {}).get(SNAPSHOT_KEY)
    try:
        return Snapshot.model_validate_json(text) if text else None
    except ValidationError:
        return None


def kept(now: TrainingRunSpec, then: TrainingRunSpec) -> tuple[TrainingRunSpec, tuple[str, ...]]:
    """The spec that a started run goes by: what it was started with, and over it the changes that a started run may have.
    The paths of all other changes, which are ignored. The API server refuses these where it checks the CRD's rules."""
    drift = tuple(_drift(now, then))
    update: dict[str, Any] = {}
    for name, field in TrainingRunSpec.model_fields.items():
        block = getattr(then, name)
        allowed = MUTABLE.get(field.alias or name, ())
        changes = {each: getattr(getattr(now, name), each) for each in _names(block, allowed)}
        if changes:
            update[name] = block.model_copy(update=changes)
    spec = then.model_copy(update=update)
    if now.hyperparameters.steps < then.hyperparameters.steps:
        spec = spec.model_copy(update={"hyperparameters": then.hyperparameters})
    return spec, drift


def _drift(now: TrainingRunSpec, then: TrainingRunSpec) -> Iterator[str]:
    for name, field in TrainingRunSpec.model_fields.items():
        path, new, old = field.alias or name, getattr(now, name), getattr(then, name)
        if path not in MUTABLE:
            if new != old:
                yield f"spec.{path}"
            continue
        for inner, inner_field in type(old).model_fields.items():
            alias = inner_field.alias or inner
            if alias not in MUTABLE[path] and getattr(new, inner) != getattr(old, inner):
                yield f"spec.{path}.{alias}"
    if now.hyperparameters.steps < then.hyperparameters.steps:
        yield "spec.hyperparameters.steps"


def _names(block: Block, aliases: tuple[str, ...]) -> list[str]:
    """Python's names of a block's fields, by those of the wire."""
    return [name for name, field in type(block).model_fields.items() if (field.alias or name) in aliases]
