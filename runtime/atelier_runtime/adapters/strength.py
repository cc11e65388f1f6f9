"""How strong an adapter is: what its update is multiplied by, as peft's `set_scale` and lycoris-lora's `multiplier` have it.

At strength k the weight W of a layer becomes W + k dW of LoRA, LoCon, DyLoRA, LoHa and LoKr, W (1 + k w) of (IA)³, W + k (R - I) W of
Diag-OFT; of BOFT each stage R of its product becomes I + k (R - I). At 0 that is the base, at 1 what is published.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from peft.tuners.lora import LoraLayer
from torch import nn

from atelier_runtime.adapters.lora import ADAPTER_NAME
from atelier_runtime.lycoris_layout import CHILD


def at_strength(denoisers: Iterable[nn.Module], strength: float) -> AbstractContextManager[None]:
    """The adapters on the denoisers at this strength inside, and at 1 again behind it, whatever happens.

    A backward pass belongs inside, like its forward pass: activations that are computed again need the strength that they had.
    Raises ValueError where there is no adapter that has one.
    """
    return nullcontext() if strength == 1.0 else _changed(list(denoisers), strength)


@contextmanager
def _changed(models: Sequence[nn.Module], strength: float) -> Iterator[None]:
    try:
        if not _set(models, strength):
            raise ValueError(f"a strength of {strength:g} is asked of denoisers without an adapter that has one")
        yield
    finally:
        _set(models, 1.0)


def _set(models: Sequence[nn.Module], strength: float) -> int:
    """Gives how many layers there were to set."""
    count = 0
    for name, module in (named for model in models for named in model.named_modules()):
        if isinstance(module, LoraLayer):
            module.set_scale(ADAPTER_NAME, strength)
        elif name.endswith(f".{CHILD}"):
            module.multiplier = strength
        else:
            continue
        count += 1
    return count
