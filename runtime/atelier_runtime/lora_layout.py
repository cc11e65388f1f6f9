"""How ComfyUI and kohya's scripts name the layers of a family in a LoRA file. Each family's module has its own names.

Facts are those of ComfyUI's `comfy/lora.py` and `comfy/utils.py`, of sd-scripts' `networks/lora_{flux,sd3}.py`, and of diffusers'
`loaders/lora_conversion_utils.py`, which reads such files back. Where an original repository fuses layers that diffusers has apart,
several modules become one LoRA of a multiple of the rank.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
ADDED_QUERY_KEY_VALUE = ("add_q_proj", "add_k_proj", "add_v_proj")
THIRDS = (1, 1, 1)


@dataclass(frozen=True)
class LoraKey:
    """Where the LoRA of a module goes. The layer `name` holds `len(heights)` modules below each other, this one is number `part`.

    `heights` are the output rows of the parts as multiples of the input width, which a part that is not trained cannot tell.
    """

    name: str
    part: int = 0
    heights: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Rule:
    """A regular expression over whole module names, the template of the layer's name, and the place in a fused layer."""

    module: str
    layer: str
    part: int = 0
    heights: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class LoraLayout:
    """One family's names. `architecture` is the id in the modelspec header. `flat`: kohya's underscores, else dots."""

    architecture: str
    flat: bool
    rules: tuple[Rule, ...]

    def key(self, module: str) -> LoraKey | None:
        """The place of a module (its full name in diffusers); None where the layout has no name for it."""
        for rule in self.rules:
            if match := re.fullmatch(rule.module, module):
                layer = match.expand(rule.layer)
                name = f"lora_unet_{layer.replace('.', '_')}" if self.flat else f"diffusion_model.{layer}"
                return LoraKey(name, rule.part, rule.heights)
        return None


def fused(prefix: str, modules: tuple[str, ...], layer: str, heights: tuple[int, ...]) -> Iterator[Rule]:
    """Modules that are one layer there, below each other."""
    for part, module in enumerate(modules):
        yield Rule(prefix + re.escape(module), layer, part, heights)


def plain(prefix: str, layer_prefix: str, names: Mapping[str, str]) -> Iterator[Rule]:
    """Modules of which each is a layer there."""
    for module, layer in names.items():
        yield Rule(prefix + re.escape(module), layer_prefix + layer)
