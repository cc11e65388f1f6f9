"""The registry of model families: one line each, explicit."""

from atelier_api.errors import ConfigError
from atelier_runtime.families.flux import Flux
from atelier_runtime.families.sd3 import StableDiffusion3
from atelier_runtime.families.sdxl import StableDiffusionXL
from atelier_runtime.families.wan import Wan
from atelier_runtime.families.z_image import ZImage
from atelier_runtime.family import Family

FAMILIES: dict[str, Family] = {
    "sd3": StableDiffusion3(),
    "flux": Flux(),
    "sdxl": StableDiffusionXL(),
    "z_image": ZImage(),
    "wan": Wan(),
}


def get_family(name: str) -> Family:
    """The family of that name. Raises ConfigError with the known names."""
    if name not in FAMILIES:
        raise ConfigError(f"spec.model.family is {name!r}; allowed are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
