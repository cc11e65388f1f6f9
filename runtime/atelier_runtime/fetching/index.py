"""`model_index.json` of a checkpoint that is yet to be fetched."""

import json
from collections.abc import Mapping
from typing import Any

from atelier_api.errors import ConfigError
from atelier_api.families import FamilyFacts
from atelier_api.model_files import INDEX


def parse_index(source: str, data: bytes) -> dict[str, Any]:
    """The index. Raises ConfigError where it is no JSON object."""
    try:
        index = json.loads(data)
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise ConfigError(
            f"spec.model.source is {source!r}, whose {INDEX} is no JSON object; choose another checkpoint"
        )
    return index


def check_index(source: str, index: Mapping[str, Any], family: FamilyFacts) -> None:
    """Raise ConfigError, before gigabytes are fetched, where the checkpoint is of another family."""
    if index.get("_class_name") not in family.pipelines:
        raise ConfigError(
            f"spec.model.family is {family.name!r}, which trains checkpoints of {', '.join(family.pipelines)}, but {source} is a "
            f"{index.get('_class_name')}; change spec.model.family or spec.model.source"
        )
