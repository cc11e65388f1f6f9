"""Adapters of lycoris-lora for tests: each type, small, and in the ways that differ from each other."""

from typing import Any

from lycoris import create_lycoris_from_weights
from lycoris.modules.ia3 import IA3Module
from pydantic import TypeAdapter
from torch import Tensor, nn

from atelier_api.v1alpha1.adapter import Adapter, LycorisAdapter

# Small enough for tiny layers: factor 4 and blocks of up to 16 fit sides of 16 to 64.
OPTIONS: dict[str, dict[str, Any]] = {
    "lokr": {"type": "lokr", "factor": 4},
    "lokr low-rank": {"type": "lokr", "factor": 4, "rank": 2, "alpha": "3"},
    "lokr low-rank twice": {"type": "lokr", "factor": 4, "rank": 1, "alpha": "0.5", "decomposeBoth": True},
    "lokr dora": {"type": "lokr", "factor": 4, "rank": 2, "alpha": "3", "dora": True},
    "loha": {"type": "loha", "rank": 4, "alpha": "3"},
    "loha dora": {"type": "loha", "rank": 4, "dora": True},
    "locon": {"type": "locon", "rank": 4},
    "locon dora": {"type": "locon", "rank": 4, "alpha": "3", "dora": True},
    "diag-oft": {"type": "diag-oft", "blockSize": 4},
    "boft": {"type": "boft", "blockSize": 16},
    "dylora": {"type": "dylora", "rank": 4, "rankBlock": 2, "alpha": "3"},
    "ia3": {"type": "ia3"},
    "ia3 on inputs": {"type": "ia3", "inputTargets": ["mlp"]},
}


def lycoris_adapter(name: str, **changes: Any) -> LycorisAdapter:
    """The adapter of a name above, on `all` layers of the blocks."""
    adapter: Any = TypeAdapter(Adapter).validate_python({"targets": ["all"]} | OPTIONS[name] | changes)
    return adapter  # type: ignore[no-any-return]


def stock_modules(model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
    """The library's own modules for the tensors of a file, on a model that knows nothing of ours, not yet put on.

    Its reader of whole files is not for (IA)³, whose modules are made one by one.
    """
    if not any(name.endswith(".on_input") for name in tensors):
        return list(create_lycoris_from_weights(1.0, "", model, weights_sd=tensors)[0].loras)
    modules = []
    for name, layer in model.named_modules():
        key = f"lycoris_{name.replace('.', '_')}"
        if f"{key}.weight" in tensors:
            modules.append(IA3Module(key, layer, train_on_input=bool(tensors[f"{key}.on_input"])))
            modules[-1].load_state_dict({part: tensors[f"{key}.{part}"] for part in ("weight", "on_input")})
    return modules
