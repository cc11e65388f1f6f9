"""A wrapper that is asked as what it wraps."""

from typing import Any


class Transparent:
    """Shows the attributes of the `module` inside (`config`, `dtype`, `add_adapter` …), so that a family need not know.

    Goes before the class of torch, whose own attributes come first.
    """

    def __getattr__(self, name: str) -> Any:
        inherited = super().__getattr__  # type: ignore[misc]
        try:
            return inherited(name)
        except AttributeError:
            return getattr(inherited("module"), name)
