"""The matrix to match: what trainers of these models promise of each, and which of our cells show that it is kept.

A promise is a cell of 28 models by 11 features, 266 of the 308 with a ✓. It is kept where each of the feature's cells is proved of
each of the model's families. tests/api/test_promised.py holds the one to the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from atelier_api.families.conformance import CELLS, NOT_APPLICABLE, PROVED, table

FEATURES: dict[str, tuple[str, ...]] = {
    "PEFT LoRA": ("lora", "export"),
    "LyCORIS": ("lycoris",),
    "full-rank": ("full", "fsdp2", "zero3"),
    "quantization": ("quantized",),
    "mixed precision": ("bf16",),
    "gradient checkpointing": ("recompute",),
    "flow shift": ("shift",),
    "TwinFlow": ("twinflow",),
    "LayerSync": ("layersync",),
    "ControlNet": ("controlnet",),
    "sliders": ("slider",),
}
"""Columns of the matrix, and the cells of the conformance table that show each."""


@dataclass(frozen=True)
class Promise:
    """One row: a model, the families that train it, and ✓ or ✗ for each of `FEATURES` in their order."""

    model: str
    families: tuple[str, ...]
    marks: str

    @property
    def promised(self) -> dict[str, bool]:
        """By feature."""
        return {feature: mark == "✓" for feature, mark in zip(FEATURES, self.marks, strict=True)}


# Quantisation that is "not recommended" or "not supported" is not promised.
MATRIX = (
    Promise("PixArt Sigma", ("pixart_sigma",), "✗✓✓✓✓✓✗✗✓✓✓"),
    Promise("NVLabs Sana", ("sana",), "✗✓✓✓✓✓✓✓✓✗✓"),
    Promise("Kwai Kolors", ("kolors",), "✓✓✓✗✓✓✗✗✗✗✓"),
    Promise("Stable Diffusion 3", ("sd3",), "✓✓✓✓✓✓✓✓✓✓✓"),
    Promise("Flux.1", ("flux",), "✓✓✓✓✓✓✓✓✓✓✓"),
    Promise("Flux.2", ("flux2",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Flux Kontext", ("flux_kontext",), "✓✓✓✓✓✓✓✓✓✓✓"),
    Promise("Z-Image Turbo", ("z_image",), "✓✗✓✓✓✓✓✓✓✗✓"),
    Promise("ACE-Step", ("ace_step", "ace_step_v1"), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Chroma 1", ("chroma",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Auraflow", ("auraflow",), "✓✓✓✓✓✓✓✓✓✓✓"),
    Promise("HiDream I1", ("hidream",), "✓✓✓✓✓✓✓✓✓✓✓"),
    Promise("OmniGen", ("omnigen",), "✓✓✓✓✓✓✓✗✗✗✓"),
    Promise("Stable Diffusion XL", ("sdxl",), "✓✓✓✗✓✓✗✗✓✓✓"),
    Promise("Lumina2", ("lumina2",), "✓✓✓✓✓✓✓✓✗✗✓"),
    Promise("Cosmos2", ("cosmos2",), "✓✓✓✗✓✓✓✓✓✗✓"),
    Promise("LTX Video", ("ltx", "ltx_i2v"), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Hunyuan Video 1.5", ("hunyuan_video15",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Wan 2.x", ("wan", "wan_ti2v"), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Qwen Image", ("qwen_image",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Qwen Image Edit", ("qwen_image_edit",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("Stable Cascade (C)", ("stable_cascade",), "✓✓✓✗✓✓✗✗✗✗✓"),
    Promise("Kandinsky 5.0 Image", ("kandinsky5_image",), "✓✓✓✓✓✓✓✓✗✗✓"),
    Promise("Kandinsky 5.0 Video", ("kandinsky5_video",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("LongCat-Video", ("longcat_video",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("LongCat-Video Edit", ("longcat_video_edit",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("LongCat-Image", ("longcat_image",), "✓✓✓✓✓✓✓✓✓✗✓"),
    Promise("LongCat-Image Edit", ("longcat_image_edit",), "✓✓✓✓✓✓✓✓✓✗✓"),
)
"""The rows, in the matrix's order."""

INSTEAD = {("Stable Cascade (C)", "mixed precision"): ("overfits",)}
"""What shows a promise that is another for this model: that it trains in fp32, as it must. All that is proved of it is in fp32."""


def kept(row: Promise, feature: str) -> bool:
    """Whether all that shows this feature is proved of all families of the model, promised or not."""
    cells = INSTEAD.get((row.model, feature), FEATURES[feature])
    rows = table()
    return all(rows.get(family, {}).get(cell) == PROVED for family in row.families for cell in cells)


def matrix_cells(*, promised: bool) -> Iterator[tuple[Promise, str]]:
    """The cells of the matrix, as (row, feature), that have a ✓ or that have none."""
    for row in MATRIX:
        for feature, has_mark in row.promised.items():
            if has_mark == promised:
                yield row, feature


def tally() -> str:
    """Two sentences: how much of the conformance table is proved, and how much of the matrix is kept."""
    rows = table()
    values = [row.get(cell, "") for row in rows.values() for cell in CELLS]
    proved, idle = values.count(PROVED), sum(value.startswith(NOT_APPLICABLE) for value in values)
    untried = f", {values.count('')} not tried yet" if "" in values else ""
    (good, promised), (beyond, others) = (_counts(promised=each) for each in (True, False))
    return (
        f"{proved} of {len(values)} cells of {len(rows)} families are proved, {idle} are not applicable{untried}. "
        f"Of what trainers of these models promise, {good} of {promised} are proved; of what they do not, {beyond} of {others}."
    )


def _counts(*, promised: bool) -> tuple[int, int]:
    """How many of those cells of the matrix are proved, and how many there are."""
    found = [kept(*cell) for cell in matrix_cells(promised=promised)]
    return sum(found), len(found)
