"""Adapters of lycoris-lora for tests: each type, small, and in the ways that differ from each other."""

from typing import Any

from pydantic import TypeAdapter

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
}


def lycoris_adapter(name: str, **changes: Any) -> LycorisAdapter:
    """The adapter of a name above, on `all` layers of the blocks."""
    adapter: Any = TypeAdapter(Adapter).validate_python({"targets": ["all"]} | OPTIONS[name] | changes)
    return adapter  # type: ignore[no-any-return]
