"""Which layers an adapter goes on: `spec.adapter.targets` resolved against the real denoiser."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from atelier_api.errors import ConfigError
from atelier_runtime.family import Family
from atelier_runtime.module_names import count_by_pattern, matched


def resolve_targets(denoiser: nn.Module, targets: Sequence[str], family: Family) -> list[str]:
    """Full names of the linear layers that `targets` name, in the order of the model, without the family's dead modules.

    A target is a preset of the family or a regular expression over whole module names. Raises ConfigError where one of them
    matches nothing: a typo beside a good target would otherwise go unseen. A convolution with a kernel of one pixel or sample is
    linear, too.
    """
    names = [name for name, module in denoiser.named_modules() if _is_linear(module)]
    dead = set(family.dead_modules(denoiser))
    wanted: set[str] = set()
    for target in targets:
        found = _matches(target, names, family) - dead
        if not found:
            raise _no_match(target, names, dead, family)
        wanted |= found
    return [name for name in names if name in wanted]


def _is_linear(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv1d | nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1
    return pointwise or isinstance(module, nn.Linear)


def check_inputs(targets: Sequence[str], names: Sequence[str], family: Family) -> None:
    """Raise ConfigError where one of `spec.adapter.inputTargets` is for none of the trained layers `names`."""
    for target in targets:
        if not _matches(target, names, family, "inputTargets"):
            raise ConfigError(
                f"spec.adapter.inputTargets has {target!r}: none of the layers that spec.adapter.targets names matches; "
                f"the nearest are {', '.join(_nearest(target, names))}"
            )


def _matches(target: str, names: Sequence[str], family: Family, field: str = "targets") -> set[str]:
    try:
        return matched(target, names, family.lora_targets)
    except re.error as error:
        raise ConfigError(
            f"spec.adapter.{field} has {target!r}, which is no regular expression ({error}); "
            f"allowed are the presets {', '.join(family.lora_targets)} or regular expressions over whole module names"
        ) from error


def _no_match(target: str, names: Sequence[str], dead: set[str], family: Family) -> ConfigError:
    if _matches(target, names, family):
        reason = f"it matches only {', '.join(sorted(dead))}, whose output family {family.name} throws away"
    else:
        reason = f"no linear layer of the denoiser matches; the nearest are {', '.join(_nearest(target, names))}"
    return ConfigError(
        f"spec.adapter.targets has {target!r}: {reason}; allowed are the presets {', '.join(family.lora_targets)} "
        "or regular expressions over whole module names"
    )


def _nearest(target: str, names: Sequence[str], limit: int = 5) -> list[str]:
    """Patterns of module names that look most like `target`: those that hold its words first, then by similarity."""
    words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\\[a-zA-Z]", "", target))

    def likeness(pattern: str) -> tuple[int, float]:
        ratio = difflib.SequenceMatcher(None, target, pattern, autojunk=False).ratio()
        return sum(word in pattern for word in words), ratio

    return sorted(count_by_pattern(names), key=likeness, reverse=True)[:limit]
