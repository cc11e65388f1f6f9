"""Which layouts of `spec.publish.formats` can hold which type of adapter. One table: rules, CRD, planner and runtime read it."""

from collections.abc import Mapping, Sequence

LYCORIS = ("lokr", "loha", "locon", "diag-oft", "boft", "dylora", "ia3")
"""Types of adapter that lycoris-lora makes."""

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "lora": ("diffusers", "kohya"),
    "full": ("diffusers",),
    "controlnet": ("diffusers",),
    "textual-inversion": ("diffusers",),
    **dict.fromkeys(LYCORIS, ("lycoris",)),
}
"""Layouts by type of adapter."""


def written(adapter_type: str, formats: Sequence[str]) -> list[str]:
    """Those of `formats` that can hold an adapter of this type."""
    return [layout for layout in formats if layout in LAYOUTS[adapter_type]]
