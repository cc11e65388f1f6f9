"""What every block of the API is made of: strict camelCase models, and decimals that are strings on the wire.

Kubernetes objects hold no floats (they do not round-trip through every client), so a decimal is a string with a pattern in the
CRD. Inside Python it is a plain `float`; the command line accepts a YAML number as well.
"""

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

DECIMAL_PATTERN = r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"

LONGEST_DECIMAL = 32
"""Characters of a decimal string."""


class Block(BaseModel):
    """A block of the spec: camelCase keys, unknown keys refused, immutable once parsed."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


def parse_decimal(value: Any) -> float:
    """The number in a decimal string (or a plain number). Raises ValueError when it is neither, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError('must be a decimal such as "0.1" or "1e-4"')
    if isinstance(value, str) and (len(value) > LONGEST_DECIMAL or not re.fullmatch(DECIMAL_PATTERN, value)):
        raise ValueError(f'must be a decimal such as "0.1" or "1e-4", of at most {LONGEST_DECIMAL} characters')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("must be finite")
    return number


def format_decimal(value: float) -> str:
    """The shortest string that reads back as the same number: 0.0001 -> "0.0001", 1.0 -> "1"."""
    return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


Decimal = Annotated[
    float,
    BeforeValidator(parse_decimal),
    PlainSerializer(format_decimal, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": DECIMAL_PATTERN, "maxLength": LONGEST_DECIMAL}),
]
"""A decimal. Bounds go beside it: `Annotated[Decimal, Field(gt=0, le=1)]`; the CRD gets them as a CEL rule."""
