"""The behaviour of the model families: each is a module of the name that it has in the API's table."""

from importlib import import_module

from atelier_api.errors import ConfigError
from atelier_api.families import NAMES
from atelier_runtime.family import Family

FAMILIES: dict[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in NAMES}


def get_family(name: str) -> Family:
    """The family of that name. Raises ConfigError with the known names."""
    if name not in FAMILIES:
        raise ConfigError(f"spec.model.family is {name!r}; allowed are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
