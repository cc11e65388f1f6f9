"""What may differ between a run and its continuation. Everything else would be another run under the same name."""

import json
from collections.abc import Iterator
from typing import Any

from atelier_api.v1alpha1 import TrainingRunSpec

STEPS = "spec.hyperparameters.steps"

ALLOWED = (
    STEPS,
    "spec.hyperparameters.microBatchSize",
    "spec.hyperparameters.gradientCheckpointing",
    "spec.parallelism",
    "spec.storage.checkpoint",
    "spec.storage.resume",
    "spec.storage.s3",
    "spec.validation",
    "spec.publish",
    "spec.schedule",
    "spec.retry",
)
"""Fields, with all below them, that do not change what the next step computes. The number of steps may only grow."""


def refused_changes(before: TrainingRunSpec, after: TrainingRunSpec) -> list[str]:
    """One sentence per change that a continuation may not make."""
    found = []
    differences = _differences("spec", _wire(before), _wire(after))
    for path, old, new in differences:
        if path == STEPS and new < old:
            found.append(f"{path} is {_shown(new)}, it was {_shown(old)}; it may only grow")
        elif not any(path == allowed or path.startswith(f"{allowed}.") for allowed in ALLOWED):
            found.append(f"{path} is {_shown(new)}, it was {_shown(old)}")
    return found


def _wire(spec: TrainingRunSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True)


def _differences(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of every value that differs; lists are compared as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(f"{path}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield path, before, after


def _shown(value: Any) -> str:
    """In one line, of the items of a list only what was said."""
    if isinstance(value, list):
        value = [_said(item) for item in value]
    return json.dumps(value, ensure_ascii=False)


def _said(item: Any) -> Any:
    return {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item
