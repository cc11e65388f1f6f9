"""What the tests know of the model families, a module each: a tiny real pipeline, and the published sizes.

Tiny pipelines are stock diffusers and transformers classes with random weights, no download, under a second each. Weights are seeded,
so two calls give the same pipeline. Resolution 32 or 64 px is meant: the autoencoders reduce by 8.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from atelier_api.families import NAMES
from family_models.kinds import Published, Tiny
from family_models.published_parts import without_memory

_MODULES = {name: import_module(f"{__name__}.{name}") for name in NAMES}

TINY: dict[str, Tiny] = {name: tiny for module in _MODULES.values() for name, tiny in module.TINY.items()}
"""By the name of the tiny pipeline: the family's, or another where a family has several that differ in structure."""
FAMILY_OF: dict[str, str] = {name: family for family, module in _MODULES.items() for name in module.TINY}
PUBLISHED: dict[str, Published] = {family: module.PUBLISHED for family, module in _MODULES.items()}


def tiny_pipeline(name: str) -> Any:
    """The stock pipeline, fp32 on the CPU, in eval mode."""
    pipe = TINY[name].make()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipe


def save_tiny(name: str, folder: Path) -> Path:
    """Writes the tiny checkpoint, laid out as a hub repository; gives the folder."""
    for path, content in _saved(name).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


@cache
def _saved(name: str) -> dict[Path, bytes]:
    """The files of the tiny checkpoint, by their place in its folder."""
    with TemporaryDirectory() as made, torch.random.fork_rng(devices=[]):
        tiny_pipeline(name).save_pretrained(made)
        folder = Path(made)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published_denoiser(family: str, flavour: str) -> nn.Module:
    """The denoiser in bf16 on the meta device: shapes without memory."""
    model, config = PUBLISHED[family].denoisers[flavour]
    return without_memory(lambda: model(**config)).to(torch.bfloat16)
