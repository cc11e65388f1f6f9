"""How lycoris-lora names what it trains in a file: `lycoris_<module, its dots as underscores>.<tensor>`, and of most an alpha.

Facts of its `wrapper.py` (LORA_PREFIX) and of each module's `custom_state_dict`. ComfyUI reads these names, with the module names of
diffusers, for the families that its `lora.py` maps.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from atelier_api.v1alpha1.adapter import Ia3Adapter, LycorisAdapter, ScaledLycorisAdapter, alpha_of
from atelier_runtime.family import Family
from atelier_runtime.module_names import matched

CHILD = "lycoris"
"""Name of the library's module below the layer that it is put on."""

PREFIX = "lycoris_"

_FIRST = ("lokr_w1", "lokr_w1_a", "hada_w1_a", "lora_up.weight")
"""The tensor of each type that the scale goes into."""


def layer_name(module: str) -> str:
    """Name of a module's tensors in a file, before the first dot."""
    return PREFIX + module.replace(".", "_")


def strength(adapter: LycorisAdapter, tensors: Mapping[str, object]) -> float:
    """What the update of a module with these tensors is multiplied by: alpha / rank.

    It is 1 for rotations and (IA)³, and for a LoKr of two whole factors: that is how all readers of such files have it.
    """
    if not isinstance(adapter, ScaledLycorisAdapter) or {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return 1.0
    return alpha_of(adapter) / adapter.rank


def input_modules(modules: Iterable[str], adapter: Ia3Adapter, family: Family) -> set[str]:
    """Those of the trained modules whose inputs are scaled, not their outputs."""
    names = list(modules)
    return {name for target in adapter.input_targets for name in matched(target, names, family.lora_targets)}


def file_tensors(weights: Mapping[str, Tensor], adapter: LycorisAdapter, family: Family) -> dict[str, Tensor]:
    """The tensors of a file, from parameters by their names in the denoiser (`<module>.lycoris.<tensor>`).

    The scale is in the first factor and alpha is the rank, as the library has it with its `scalar`: its `merge_to` applies
    alpha / rank of LoKr and LoHa twice, and is right for 1 alone. So a DyLoRA that is cut keeps its alpha: the update of r ranks is
    then scaled by alpha / r. (IA)³ has no alpha, and says of each layer whether its inputs are scaled.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        module, found, key = name.rpartition(f".{CHILD}.")
        if not found:
            raise ValueError(f"{name} is no parameter of lycoris-lora")
        modules.setdefault(module, {})[key] = tensor
    alpha = torch.tensor(float(adapter.rank) if isinstance(adapter, ScaledLycorisAdapter) else 0.0)
    inputs = input_modules(modules, adapter, family) if isinstance(adapter, Ia3Adapter) else set()
    result = {}
    for module, tensors in modules.items():
        scale, layer = torch.tensor(strength(adapter, tensors)), layer_name(module)
        for key, tensor in tensors.items():
            result[f"{layer}.{key}"] = (tensor * scale if key in _FIRST else tensor).contiguous()
        if isinstance(adapter, Ia3Adapter):
            result[f"{layer}.on_input"] = torch.tensor(int(module in inputs))
        else:
            result[f"{layer}.alpha"] = alpha.clone()
    return result
