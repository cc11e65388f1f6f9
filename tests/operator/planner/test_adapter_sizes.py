"""Trained parameters of every type against the library's own modules, and what their forward pass keeps against what autograd saves.

The runtime builds the modules; tests/runtime/adapters counts them on whole denoisers as well.
"""

from typing import Any

import pytest
import torch
from torch import nn

from atelier_api.errors import ConfigError
from atelier_api.v1alpha1.adapter import BoftAdapter, FullAdapter, LoraAdapter
from atelier_operator.planner import table_facts
from atelier_operator.planner.adapter_sizes import Linear, butterfly_block, divided, kept_bytes, parameters
from atelier_operator.planner.memory import trained_parameters
from atelier_runtime.adapters import install, trainable
from atelier_runtime.families import get_family
from lycoris_adapters import OPTIONS, lycoris_adapter
from planned_runs import run

SIDES = ((1152, 1152), (3072, 768), (1536, 8960), (100, 60), (48, 48))
"""Outputs and inputs: published widths, and ones that few factors divide."""

KNOWN = [name for name in OPTIONS if name != "ia3 on inputs"]
"""Of `inputTargets` the planner does not know the layers: it counts the larger side, and what a scaled output keeps."""

ADAPTERS: dict[str, Any] = {
    **{name: lycoris_adapter(name, targets=[".*"]) for name in KNOWN},
    "lokr by default": lycoris_adapter("lokr", targets=[".*"], factor=16),
    "loha by default": lycoris_adapter("loha", targets=[".*"], rank=32),
    "diag-oft by default": lycoris_adapter("diag-oft", targets=[".*"], blockSize=64),
    "dylora by default": lycoris_adapter("dylora", targets=[".*"], rank=128, rankBlock=1),
    "boft by default": lycoris_adapter("boft", targets=[".*"], blockSize=64),
    "lora": LoraAdapter(targets=[".*"]),
    "dora": LoraAdapter(targets=[".*"], dora=True),
    "full": FullAdapter(type="full"),
}


@pytest.mark.parametrize(("outputs", "inputs"), SIDES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_parameters_of_a_layer_are_those_that_train(name: str, outputs: int, inputs: int) -> None:
    adapter = ADAPTERS[name]
    layers = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False)})
    if isinstance(adapter, BoftAdapter) and butterfly_block(outputs, adapter.block_size) is None:
        with pytest.raises(ConfigError, match="BOFT cannot cut"):
            install(layers, adapter, get_family("wan"))
        return
    try:
        install(layers, adapter, get_family("wan"))
    except ConfigError as error:
        assert "could not load" in str(error)  # noqa: PT017  # counted all the same, but never trained
        return
    assert parameters(adapter, Linear(outputs, inputs)) == sum(p.numel() for p in trainable(layers).values())


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (3072, 16, (16, 192)),
        (48, 16, (3, 16)),
        (40, 16, (5, 8)),
        (127, 8, (1, 127)),
        (250, 8, (5, 50)),
        (36, 64, (6, 6)),
    ],
)
def test_a_side_is_divided_as_the_library_does(size: int, factor: int, expected: tuple[int, int]) -> None:
    from lycoris.functional.general import factorization

    assert divided(size, factor) == factorization(size, factor) == expected


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_what_a_layer_keeps_is_what_autograd_saves(name: str, precision: torch.dtype) -> None:
    adapter, outputs, inputs, tokens = lycoris_adapter(name, targets=[".*"]), 256, 512, 96
    layers = nn.ModuleDict({"layer": nn.Linear(inputs, outputs)}).to(precision)
    install(layers, adapter, get_family("wan"))
    x = torch.randn(tokens, inputs, dtype=precision, requires_grad=True)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layers.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        layers["layer"](x)
    saved = sum(storage.nbytes() for storage in kept.values())
    predicted = kept_bytes(adapter, Linear(outputs, inputs), tokens, precision.itemsize)
    small = 0.1 * outputs * inputs * precision.itemsize  # casts of the matrices, and a low rank's own
    assert 0.85 * saved - small <= predicted <= 1.6 * saved + small


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "boft"])
def test_the_estimate_for_a_model_counts_each_layer_of_its_blocks(name: str) -> None:
    spec = run("flux", adapter=OPTIONS[name] | {"targets": ["attention"]}).spec
    model = table_facts(spec.model)
    layer = parameters(spec.adapter, Linear(model.width, model.width))
    assert trained_parameters(spec, model) == model.layers * 8 * layer
