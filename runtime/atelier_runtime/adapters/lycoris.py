"""LoKr, LoHa, LoCon, Diag-OFT, BOFT, DyLoRA and (IA)³, all by lycoris-lora.

The library's modules are put on single layers here. Its own way (`create_lycoris`) keeps the targets in attributes of a class, one
for the whole process, and passes over what it does not match. Each layer gets its module as the child `lycoris` and the module's
forward: so parameters have names below the layer's, lie inside the block that is sharded or recomputed, and train like any other.

How the library's forward is used:

* LoKr, LoHa and LoCon without weight decomposition, DyLoRA and (IA)³ add their update to the layer's output (`bypass_mode`). The
  library's other way adds it to the weight first, in the base's precision: in bf16 that swallows updates below 1/256 of a weight.
* What cannot be done so (weight decomposition, rotations) computes the whole changed weight, here in fp32 whatever the base has.

Left out: `full` (it takes the weights away from the layers, and type full is there).
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lycoris.modules import get_module, make_module
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.adapter import (
    BoftAdapter,
    DiagOftAdapter,
    DyloraAdapter,
    Ia3Adapter,
    LokrAdapter,
    LycorisAdapter,
    ScaledLycorisAdapter,
)
from atelier_runtime.adapters.dylora import DrawnBlock, Dylora
from atelier_runtime.adapters.ia3 import Ia3
from atelier_runtime.adapters.report import AdapterReport, report
from atelier_runtime.adapters.targets import check_inputs, resolve_targets
from atelier_runtime.family import Family
from atelier_runtime.lycoris_layout import CHILD, input_modules, layer_name, strength
from atelier_runtime.module_names import count_by_pattern

logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # it writes notes to stdout, which are no JSON lines


class _Exact(LycorisBaseModule):
    """Computes the changed weight in fp32."""

    def _current_weight(self) -> Tensor:
        return super()._current_weight().float()


class _ExactLokr(_Exact, LokrModule):
    pass


class _ExactLoha(_Exact, LohaModule):
    pass


class _ExactLocon(_Exact, LoConModule):
    pass


class _Rotation(_Exact):
    def make_weight(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outside autocast: in bf16 the rotation of a weight would differ from the weight by more than training moves it."""
        with torch.autocast(self.device.type, enabled=False):
            return super().make_weight(*args, **kwargs)


class _DiagOft(_Rotation, DiagOFTModule):
    pass


class _Boft(_Rotation, ButterflyOFTModule):
    pass


def install_lycoris(
    denoiser: nn.Module, adapter: LycorisAdapter, family: Family, *, dtype: torch.dtype
) -> AdapterReport:
    """Put the library's modules with weights in `dtype` on the targets and freeze all else.

    The start values are drawn from torch's global generator, on the CPU. The output does not change: one factor of each product
    starts at zero, a rotation at the identity, the norms of weight decomposition at those of the weight (up to rounding). Raises
    ConfigError where a target matches nothing, a layer does not suit the type, or an option would do nothing.
    """
    names = resolve_targets(denoiser, adapter.targets, family)
    denoiser.requires_grad_(False)
    draw = None
    if isinstance(adapter, Ia3Adapter):
        check_inputs(adapter.input_targets, names, family)
        inputs = input_modules(names, adapter, family)
        modules = {name: _scales(name, denoiser.get_submodule(name), on_input=name in inputs) for name in names}
    else:
        modules = {name: _module(name, denoiser.get_submodule(name), adapter) for name in names}
    if isinstance(adapter, DyloraAdapter):
        count = adapter.rank // adapter.rank_block
        drawn = DrawnBlock(count, index=count - 1)
        for module in modules.values():
            module.drawn = drawn
        draw = drawn.draw
    if isinstance(adapter, LokrAdapter):
        _check_options(adapter, list(modules.values()))
        _check_readable(adapter, modules)
    for module in modules.values():
        layer = module.org_module[0]
        module.to(layer.weight.device)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        layer.add_module(CHILD, module)
        module.apply_to()
    denoiser.train()
    return report(denoiser, count_by_pattern(names), draw=draw)


def _scales(name: str, layer: nn.Module, *, on_input: bool) -> Any:
    return Ia3(layer_name(name), layer, bypass_mode=True, train_on_input=on_input)


def _module(name: str, layer: nn.Module, adapter: ScaledLycorisAdapter | DiagOftAdapter | BoftAdapter) -> Any:
    """The library's module for a layer, at its start values, not yet put on."""
    if not isinstance(adapter, ScaledLycorisAdapter):
        return _rotation(name, layer, adapter)
    kinds: dict[str, tuple[Any, Any]] = {
        "lokr": (LokrModule, _ExactLokr),
        "loha": (LohaModule, _ExactLoha),
        "locon": (LoConModule, _ExactLocon),
        "dylora": (Dylora, None),
    }
    dora = not isinstance(adapter, DyloraAdapter) and adapter.dora
    factors = {"factor": adapter.factor, "decompose_both": adapter.decompose_both} if adapter.type == "lokr" else {}
    module = kinds[adapter.type][dora](
        layer_name(name),
        layer,
        lora_dim=adapter.rank,
        alpha=adapter.rank,  # the scale is in `scalar`, see `file_tensors`
        weight_decompose=dora,
        bypass_mode=not dora,
        **factors,
    )
    module.scalar.fill_(strength(adapter, dict(module.named_parameters())))
    return module


def _rotation(name: str, layer: nn.Module, adapter: DiagOftAdapter | BoftAdapter) -> Any:
    kind: Any = _Boft if isinstance(adapter, BoftAdapter) else _DiagOft
    try:
        return kind(layer_name(name), layer, lora_dim=adapter.block_size, bypass_mode=False)
    except ValueError as error:
        outputs = layer.weight.shape[0]  # type: ignore[index]
        odd = outputs // (outputs & -outputs)
        raise ConfigError(
            f"spec.adapter.blockSize is {adapter.block_size}; BOFT cannot cut the {outputs} outputs of {name} into a power of two "
            f"of even blocks of at most that side; set it to {2 * odd} or more, or take other spec.adapter.targets"
        ) from error


def _check_options(adapter: LokrAdapter, modules: Sequence[Any]) -> None:
    """Raise ConfigError for an option that does nothing on any of the layers."""
    if adapter.decompose_both and all(module.use_w1 for module in modules):
        side = max(max(module.lokr_w1.shape) for module in modules)
        raise ConfigError(
            f"spec.adapter.decomposeBoth is true, and with spec.adapter.rank {adapter.rank} no first factor becomes low-rank; "
            f"their longest side is {side}: the rank must be below {side / 2:g}"
        )
    if adapter.alpha is not None and all(module.use_w1 and module.use_w2 for module in modules):
        raise ConfigError(
            f"spec.adapter.alpha is {adapter.alpha:g}, and with spec.adapter.rank {adapter.rank} both factors of every layer are "
            "whole matrices, whose product is not scaled; leave alpha out or set a lower rank"
        )


def _check_readable(adapter: LokrAdapter, modules: Mapping[str, Any]) -> None:
    """Raise ConfigError where the library could not load the file: it guesses the factor from the shapes, and may guess wrong."""
    for (outputs, inputs), (name, module) in {tuple(m.shape[:2]): (n, m) for n, m in modules.items()}.items():
        state = {f"{module.lora_name}.{key}": tensor for key, tensor in module.state_dict().items()}
        kind, tensors = get_module(state, module.lora_name)
        try:
            with torch.random.fork_rng(devices=[]):  # start values that are not used
                make_module(kind, tensors, module.lora_name, module.org_module[0])
        except (RuntimeError, AttributeError) as error:
            fitting = [f for f in range(2, 65) if all(side % f == 0 and f * f <= side for side in (outputs, inputs))]
            way = f"set it to {' or '.join(map(str, fitting))}, or" if fitting else "change it, or"
            raise ConfigError(
                f"spec.adapter.factor is {adapter.factor}; lycoris-lora could not load the result, since it does not find out the "
                f"factors of {name} ({outputs} x {inputs}); {way} take other spec.adapter.targets"
            ) from error
